"""`DormantUnitsMonitor`: units of activation layers that no input of a batch reaches."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.activations import TAU, dormant_share
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.measuring.number_source import Detail, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.models.axes import feature_axis
from lightning_lowrank.models.names import fitting, tags
from lightning_lowrank.models.taps import Listener
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of

# Not activations of single units.
OVER_UNITS = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)


class DormantUnits(NumberSource):
    """Shares of units of each layer that are dormant, and that are inactive for every input of a step.

    Args:
        match: Layers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`; all activation layers by default.
        exclude: Patterns of what to leave out, as for `match`.
        tau: A unit is dormant if its mean absolute activation is at most `tau` times the layer's mean.

    Raises:
        ValueError: `tau` is out of range; in `plan`: a pattern matches nothing, there is no activation layer, or a
            layer is inside a compiled module.
    """

    name = "dormant"
    level = "functions"

    def __init__(
        self, match: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None, tau: float = TAU
    ) -> None:
        if not isinstance(tau, float) or not 0 <= tau < 1:
            raise ValueError(f"tau={tau!r} must be a share of the layer's mean activation, at least 0 and below 1")
        self._match, self._exclude, self._tau = match, exclude, tau
        self.quantities = [Quantity(f"dormant_{name}", per_site=True, detail="core") for name in ("share", "inactive")]
        self._listener = Listener(self._add)
        self._around: dict[str, nn.Module] = {}
        # Of each layer the sum and the largest of the magnitudes of each unit, and the number of rows.
        self._sums: dict[str, Tensor] = {}
        self._tops: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def plan(self, training: Training) -> None:
        """Choose the layers."""
        layers = {name: layer for name, layer in training.module.named_modules() if name}
        usual = {name for name, layer in layers.items() if _is_activation(layer)}
        chosen = usual if self._match is None else fitting("match", self._match, layers)
        chosen -= set() if self._exclude is None else fitting("exclude", self._exclude, layers)
        if not chosen:
            raise ValueError(
                "DormantUnitsMonitor finds no activation layer, since activations that are called as functions "
                f"have no module. Match the layers whose outputs are units. Layers: {list(layers)[:10]}"
            )
        names = tags(layers)
        heard = {names[name]: layer for name, layer in layers.items() if name in chosen}
        # What stands beside an activation says which axis has the units.
        self._around = {names[name]: training.module.get_submodule(name.rpartition(".")[0]) for name in chosen}
        self._listener.plan(training.module, heard, "units")

    def labels(self) -> list[str]:
        """One per layer."""
        return list(self._listener.layers)

    def batch_begins(self, batch: Batch) -> None:
        """Start listening."""
        self._listener.attach(self.timed)

    def batch_over(self) -> None:
        """Stop listening."""
        self._listener.detach()
        self.trouble = self._listener.take_error() or self.trouble

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Shares over all rows of the step, of all processes."""
        heard = team.all_gather_object({name: (len(sums), self._rows[name]) for name, sums in self._sums.items()})
        names = sorted(set.intersection(*(set(one) for one in heard)))
        found = [Numbers(name, self._of_layer(name, sum(one[name][1] for one in heard), team)) for name in names]
        self.detach()
        return found

    def detach(self) -> None:
        """Stop listening, and drop the unfinished sample."""
        self._listener.detach()
        self._sums, self._tops, self._rows = {}, {}, {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_around": {}, "_sums": {}, "_tops": {}, "_rows": {}}

    def _of_layer(self, name: str, num_rows: int, team: Team) -> dict[str, Tensor]:
        sums, alive = team.all_reduce(self._sums[name]), team.all_reduce((self._tops[name] > 0).to(self._sums[name]))
        inactive = torch.where(sums.isfinite().all(), (alive == 0).to(sums).mean(), torch.nan)
        return {"dormant_share": dormant_share(sums / num_rows, self._tau), "dormant_inactive": inactive}

    def _add(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        axis = feature_axis(layer, output.shape, self._around[name])
        rows = output.detach().movedim(axis, -1).flatten(0, -2).abs().to(working_dtype(output.device))
        sums, tops = self._sums.get(name, rows.new_zeros(())), self._tops.get(name, rows.new_zeros(()))
        self._sums[name], self._tops[name] = sums + rows.sum(0), torch.maximum(tops, rows.amax(0))
        self._rows[name] = self._rows.get(name, 0) + len(rows)


class DormantUnitsMonitor(Monitor):
    """How many units of each activation layer are dormant: inactive, or far below the layer's mean.

    Dormant units contribute almost nothing to the output and receive almost no gradient, so the layer is effectively
    narrower than its nominal width. A ReLU unit that is inactive on every input stays inactive, because no gradient
    reaches it. The share grows if the learning rate is too high, and in reinforcement learning as targets change. For
    activations that are rarely exactly 0 (GELU, tanh, sigmoid), only `dormant_share` is meaningful.

    Writes `dormant/share_median` and `dormant/inactive_median` (at "standard" also minimum and maximum, and each
    layer), between 0 and 1, over all rows of a step. Units are counted along the layer's feature axis; for images these
    are the channels.

    Cost: three passes over the outputs of the chosen layers per sample, and memory for two numbers per unit in float64.

    Args:
        every_n_steps: Cadence in optimizer steps; default 50.
        match: Layers whose outputs are units: globs, `re:REGEX`, `type:LAYERCLASS`; all activation layers by default.
        exclude: Patterns of what to leave out, as for `match`.
        tau: A unit is dormant if its mean absolute activation is at most `tau` times the layer's mean.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single layers: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.
        alerts: Alert rules; "default" warns if nine tenths of a layer's units are inactive.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of range; when training starts: a pattern matches nothing, or there is no
            activation layer.

    Examples:
        >>> DormantUnitsMonitor(every_n_steps=10).recorders[0].quantities
        ['dormant_share', 'dormant_inactive']

    References:
        Sokar et al. (2023), The Dormant Neuron Phenomenon in Deep Reinforcement Learning, Definitions 3.1 and 3.2.
    """

    word = "dormant"

    def __init__(
        self,
        every_n_steps: int | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        tau: float = TAU,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = "default",
        max_overhead: float | None = None,
    ) -> None:
        probes = probe_of(DormantUnits(match, exclude, tau), cadence(every_n_steps, max_overhead, 50))
        super().__init__(probes, detail=detail, per_site=per_site, alerts=alerts, name=name)


def _is_activation(layer: nn.Module) -> bool:
    """Whether its class is one of torch's activations of single units, or is named as one, as those of transformers."""
    kind = type(layer)
    torchs = kind.__module__ == "torch.nn.modules.activation" and not isinstance(layer, OVER_UNITS)
    return torchs or (kind.__name__.endswith("Activation") and not any(layer.children()))
