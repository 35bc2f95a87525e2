"""`CoordinateCheckMonitor`: how much one step changes what each linear layer makes of its input."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lowrank.distributed.shards import is_sharded
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype
from lightning_lowrank.measuring.number_source import Detail, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.source import Batch, Reading, Step
from lightning_lowrank.measuring.sources.updates import Updates
from lightning_lowrank.models.linear import linear_layers, matrix_of
from lightning_lowrank.models.names import fitting, tags
from lightning_lowrank.models.sites import Site
from lightning_lowrank.models.taps import Listener, refuse_fast_path
from lightning_lowrank.models.training import Training
from lightning_lowrank.models.views import View
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of

PLAIN = View("m n -> m n")


class Coordinates(NumberSource):
    """`|dW x| / |W x|` of each linear layer, where x are its inputs in a due step and dW is the change of its weight.

    Args:
        match: Layers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`; all linear layers by default.
        exclude: Patterns of what to leave out, as for `match`.
        num_rows: Number of rows of inputs to use, for each call of a layer.

    Raises:
        ValueError: `num_rows` is out of range. In `plan`: a pattern matches nothing, there is no linear layer, or a
            weight is sharded. Also if a layer is inside a compiled module, or in an `nn.TransformerEncoderLayer` in
            eval mode.
    """

    name = "coordinate"
    level = "functions"
    quantities = (
        Quantity("coordinate_change", per_site=True, detail="core"),
        Quantity("coordinate_change_chance", per_site=True),
        Quantity("coordinate_size", "entries", per_site=True),
    )

    def __init__(
        self, match: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None, num_rows: int = 256
    ) -> None:
        if type(num_rows) is not int or not 1 <= num_rows <= 1_000_000:
            raise ValueError(f"num_rows={num_rows!r} must be a number of rows from 1 to 1,000,000")
        self._match, self._exclude, self._num_rows = match, exclude, num_rows
        self._listener = Listener(self._add)
        self._updates = Updates(min_size=1)
        self._rows: dict[str, list[Tensor]] = {}
        # Of each layer the energies of `dW x`, of a random change as large, and of `W x`; and how many entries.
        self._sums: dict[str, Tensor] = {}

    def plan(self, training: Training) -> None:
        """Choose the layers."""
        layers = linear_layers(training.module)
        if not layers:
            raise ValueError(
                "CoordinateCheckMonitor finds no linear layer (nn.Linear or transformers' Conv1D) with an untied "
                f"weight among {list(dict(training.module.named_modules()))[1:11]}"
            )
        chosen = set(layers) if self._match is None else fitting("match", self._match, layers)
        chosen -= set() if self._exclude is None else fitting("exclude", self._exclude, layers)
        sharded = next((name for name in layers if name in chosen and is_sharded(_weight(layers[name]))), None)
        if sharded is not None:
            raise ValueError(f"CoordinateCheckMonitor: {sharded!r} is sharded, but weights must be read whole; use DDP")
        for name in sorted(chosen):
            refuse_fast_path(training.module, name, "inputs")
        names = tags(layers)
        heard = {names[name]: layer for name, layer in layers.items() if name in chosen}
        self._listener.plan(training.module, heard, "inputs")
        self._updates.sites = [_site(name, layer) for name, layer in heard.items() if not is_lazy(_weight(layer))]

    def labels(self) -> list[str]:
        """One label per trained layer."""
        return [name for name, layer in self._listener.layers.items() if _weight(layer).requires_grad]

    def batch_begins(self, batch: Batch) -> None:
        """Start listening."""
        self._updates.batch_begins(batch)
        self._listener.attach(self.timed)

    def gradients_final(self, step: Step) -> list[Any]:
        """Keep the weights."""
        self._updates.gradients_final(step)
        return []

    def step_done(self, step: Step) -> list[Any]:
        """Multiply inputs by the change, and by the weights before it."""
        for reading in self._updates.step_done(step):
            name = reading.labels[0]
            if reading.parts and name in self._rows:
                self._sums[name] = _energies(self._listener.layers[name], torch.cat(self._rows[name]), reading)
        return []

    def batch_over(self) -> None:
        """Stop listening."""
        self._listener.detach()
        self.trouble = self._listener.take_error() or self.trouble

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers over the rows of all processes."""
        heard = team.all_gather_object(list(self._sums))
        names = [name for name in self._listener.layers if all(name in one for one in heard)]
        sums = [self._sums[name] for name in names]
        self.detach()
        if not names:
            return []
        own = torch.stack(sums)
        pooled = team.all_reduce(own if team.sees_data else torch.zeros_like(own))
        return [Numbers(name, _numbers(*row.unbind())) for name, row in zip(names, pooled.unbind(), strict=True)]

    def detach(self) -> None:
        """Stop listening, and drop the unfinished sample."""
        self._listener.detach()
        self._updates.detach()
        self._rows, self._sums = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_updates": Updates(min_size=1), "_rows": {}, "_sums": {}}

    def _add(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        # Spread evenly, so that no part of a sequence counts more.
        self._rows.setdefault(name, []).append(rows[:: -(-len(rows) // self._num_rows)].clone())


class CoordinateCheckMonitor(Monitor):
    """By how much one step of the optimizer changes the output of each linear layer.

    Maximal update parametrisation (muP) makes these changes independent of the width, so that networks of different
    widths train alike. A layer with a share far above that of others learns too fast for its width. A layer with a
    share near 0 learns no features. `lightning-lowrank coordinate-check` repeats a short run over widths.

    Writes `coordinate/change_median`, the root mean square of `dW x` over that of `W x`, without bias. Here x are the
    layer's inputs in the due step, W its weight before it and dW the change by the step. From "standard" on, also the
    smallest and largest, each layer, and the size of `W x`. For comparison it writes the share of a random update of
    the same Frobenius norm that is independent of the inputs.

    Cost: on due steps, a copy of the layers' weights and of some rows of their inputs, and two products of each weight
    with these rows.

    Args:
        every_n_steps: Cadence in optimizer steps; default 50.
        match: Linear layers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`; all by default.
        exclude: Patterns of what to leave out, as for `match`.
        num_rows: Number of rows of inputs to use, for each call of a layer on each process.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single layers: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.
        alerts: Alert rules; none by default.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of range; when training starts: a pattern matches nothing, there is no linear
            layer, or a weight is sharded.

    Examples:
        >>> CoordinateCheckMonitor(every_n_steps=10).recorders[0].quantities
        ['coordinate_change', 'coordinate_change_chance', 'coordinate_size']

    References:
        Yang & Hu (2021), Tensor Programs IV, arXiv:2011.14522. Yang et al. (2022), Tensor Programs V, arXiv:2203.03466,
        Appendix D.1 (coordinate checking). Haas et al. (2025), arXiv:2505.22491 (the effect of a layer's own update).
    """

    word = "coordinate"

    def __init__(
        self,
        every_n_steps: int | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        num_rows: int = 256,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = None,
        max_overhead: float | None = None,
    ) -> None:
        probes = probe_of(Coordinates(match, exclude, num_rows), cadence(every_n_steps, max_overhead, 50))
        super().__init__(probes, detail=detail, per_site=per_site, alerts=alerts, name=name)

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """None, since a healthy share depends on the schedule."""
        return []


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


def _site(name: str, layer: nn.Module) -> Site:
    """The layer's weight as it is."""
    weight = _weight(layer)
    return Site(name, (weight,), PLAIN, (name,), weight.shape)


def _energies(layer: nn.Module, rows: Tensor, reading: Reading) -> Tensor:
    """Of `dW x`, of what a change of the same Frobenius norm and of no direction gives, and of `W x`; and how many
    entries.
    """
    assert reading.weight is not None
    with full_precision(rows.device):
        dtype = torch.promote_types(rows.dtype, torch.float32)
        rows = rows.to(dtype)
        change, weight = (
            matrix_of(layer, of.make(*of.parts)).to(dtype)  # type: ignore[arg-type]
            for of in (reading, reading.weight)
        )
        energy = partial(_energy, dtype=working_dtype(rows.device))
        return torch.stack(
            [
                energy(rows @ change.mT),
                energy(change) * energy(rows) / rows.shape[-1],
                energy(rows @ weight.mT),
                energy(rows[:, :1]).new_tensor(len(rows) * len(weight)),
            ]
        )


def _energy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm.square()


def _numbers(change: Tensor, chance: Tensor, output: Tensor, count: Tensor) -> dict[str, Tensor]:
    """NaN where what the layer puts out is 0, as at the start of a layer whose weights are."""
    shares = {"coordinate_change": change, "coordinate_change_chance": chance}
    found = {name: torch.where(output == 0, torch.nan, (of / output).sqrt()) for name, of in shares.items()}
    return found | {"coordinate_size": (output / count).sqrt()}
