"""The anatomy of each layer's gradient: inputs, signals and their product, heard in the user's own training step."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.source import Batch, Step
from lightning_lowrank.models.effective_weights import hooked
from lightning_lowrank.models.names import chosen_parameters, tags
from lightning_lowrank.models.taps import refuse_compiled
from lightning_lowrank.models.training import Training
from lightning_lowrank.monitors.anatomy.pairs import PROBES, Pairs, PairTap, as_matrix, is_heard
from lightning_lowrank.monitors.anatomy.split import LARGEST_DEVIATION, SHARES, Sides, Split, anatomy, deviation

SIDES = ("input", "signal", "gradient")
OF_A_LAYER = {
    **dict.fromkeys((*SHARES, *(f"{share}_chance" for share in SHARES), "spike_dominance", "phase_shift"), "1"),
    **dict.fromkeys(("low_rank_share", "low_rank_share_chance"), "1"),
    **{f"{side}_{rank}": "directions" for rank in ("stable_rank", "participation_ratio") for side in SIDES},
    **dict.fromkeys(("signals_limit", "horn", "alignment", "alignment_chance"), "1"),
    **dict.fromkeys(("stability", "stability_to_start", "stability_chance"), "1"),
    **dict.fromkeys(("deviation", "gap_ratio", "spike_overlap", "rows_per_dimension"), "1"),
    **dict.fromkeys(("num_residues", "num_spikes"), "directions"),
    **dict.fromkeys(("bulk_decay", "spike_strength"), "1"),
}
# What has curves of single weights also where these are many: up to 14.
FIRST = (*SHARES, "gradient_stable_rank", "alignment", "deviation")
ESTIMATED = ("bulk_decay", "spike_strength")
# What is blank where the two sides do not make the gradient.
OF_THE_PRODUCT = (*SHARES, "spike_dominance", "phase_shift", "horn", "signals_limit")

# Directions of signals that are taken for the residue's, at most.
MOST_OUTPUTS = 10
FEWEST_ROWS = 16

# Shares of residue and spike between which a layer is in neither phase.
RESIDUE, SPIKE = 0.4, 0.6


class Anatomy(NumberSource):
    """The gradient of each layer, divided by its origin.

    Args:
        match: Weights of linear layers and convolutions: globs on the name, `re:REGEX`, `type:LAYERCLASS`; all by
            default.
        exclude: Patterns of what to leave out, as for `match`.
        max_rows: Rows that are kept of each layer's inputs and signals.
        num_outputs: Number of outputs of the model, at most 10. As many directions of the signals count as directions
            of the residue. By default the width of the module's last linear layer.

    Raises:
        ValueError: A number is out of range; in `plan`: a pattern matches nothing, or a layer cannot be measured.
    """

    name = "anatomy"
    level = "functions"
    # A layer whose optimizer does not step in the first batch is waited for.
    of_parameters = True

    def __init__(
        self,
        *,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        max_rows: int = 2048,
        num_outputs: int | None = None,
    ) -> None:
        if type(max_rows) is not int or max_rows < FEWEST_ROWS:
            raise ValueError(f"max_rows={max_rows!r} must be a whole number of at least {FEWEST_ROWS}")
        if num_outputs is not None and (type(num_outputs) is not int or not 1 <= num_outputs <= MOST_OUTPUTS):
            raise ValueError(
                f"num_outputs={num_outputs!r} must be from 1 to {MOST_OUTPUTS}, or None for the width of the last "
                "linear layer"
            )
        self._match, self._exclude, self._max_rows, self._asked = match, exclude, max_rows, num_outputs
        per_site = [
            Quantity(f"anatomy_{name}", unit, True, name in ESTIMATED, detail="core" if name in FIRST else "standard")
            for name, unit in OF_A_LAYER.items()
        ]
        self.quantities = [Quantity("anatomy_loss", detail="core"), *per_site]
        self._num_outputs, self._taps = num_outputs or 1, dict[str, PairTap]()
        self._losses: list[Tensor] = []
        self._left_out: Counter[str] = Counter()
        self._device = torch.device("cpu")
        # By site: the first right singular vector at the start and at the last sample, and whether the residue ruled so
        # far.
        self._known: dict[str, dict[str, Tensor]] = {}

    def plan(self, training: Training) -> None:
        """Choose the weights, and refuse those that hooks cannot observe."""
        module = training.module
        owners = _owners(module)
        names = _names(module, owners)
        chosen = {id(parameter) for parameter in chosen_parameters(module, self._match, self._exclude).values()}
        heard = {name: weight for name, weight in names.items() if id(weight) in chosen}
        if not heard:
            there = list(names)
            raise ValueError(
                f"match={self._match!r} fits no weight whose gradient has two sides to hear: of linear "
                "layers and convolutions without "
                f"groups, not complex, sharded or parametrised; there are {there[:10]}"
            )
        for name, weight in heard.items():
            for layer in owners[id(weight)]:
                refuse_compiled(module, {name: layer}, "the anatomy")
        heard_layers = {
            id(layer) for layers in owners.values() for layer in layers if not isinstance(layer.weight, DTensor)
        }
        self._left_out = Counter(
            _described(m) for m in module.modules() if id(m) not in heard_layers and _has_matrix(m)
        )
        self._device = training.device
        widths = [m.out_features for m in module.modules() if isinstance(m, nn.Linear)]
        self._num_outputs = self._asked or min(MOST_OUTPUTS, widths[-1] if widths else MOST_OUTPUTS)
        trained = {name: weight for name, weight in heard.items() if weight.requires_grad}
        before = {id(tap.weight): tap for tap in self._taps.values()}
        self._taps = {name: before.get(id(w)) or PairTap(w, owners[id(w)]) for name, w in trained.items()}
        for tap in before.values():
            if tap not in self._taps.values():
                tap.drop()

    def labels(self) -> Sequence[str]:
        """Each weight; also the whole model if the loss is seen."""
        return list(self._taps)

    def batch_begins(self, batch: Batch) -> None:
        """Start listening."""
        for i, tap in enumerate(self._taps.values()):
            # The probes are the same in all processes, so that their products can be added up.
            tap.attach(batch.seed * 4096 + i, -(-self._max_rows // batch.training.team.size), self.timed)

    def note(self) -> str:
        """What is not measured."""
        return (
            "without " + ", ".join(f"{count} {name}" for name, count in self._left_out.items())
            if self._left_out
            else ""
        )

    def loss_live(self, loss: Tensor, scale: Tensor | float) -> None:
        """Keep the loss of the batch as the user computed it."""
        if loss.numel() == 1:
            self._losses.append(loss.detach().reshape(()) / scale)

    def gradients_final(self, step: Step) -> list[Any]:
        """Keep the gradient, since it may be clipped a moment later."""
        for tap in self._taps.values():
            if id(tap.weight) in step.parameters:
                tap.close()
        return []

    def batch_over(self) -> None:
        """Stop listening."""
        for tap in self._taps.values():
            tap.detach()

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of the layers whose gradients were final; each process has all of them."""
        for tap in self._taps.values():
            if tap.gradient is not None and tap.error is not None:
                self.trouble = self.trouble or tap.error
                tap.drop()
        final = [name for name, tap in self._taps.items() if tap.gradient is not None]
        words = team.all_gather_object(final)
        found = [self._of_layer(name, team) for name in final if all(name in word for word in words)]
        losses, self._losses = self._losses, []
        mean = torch.stack(losses).mean() if losses else torch.full((), torch.nan, device=self._device)
        loss = Numbers(WHOLE_MODEL, {"anatomy_loss": team.all_reduce(mean.to(working_dtype(self._device))) / team.size})
        return [*([loss] if losses else []), *(numbers for numbers in found if numbers is not None)]

    def detach(self) -> None:
        """Drop the sample."""
        self._losses = []
        for tap in self._taps.values():
            tap.drop()

    def facts(self) -> dict[str, float]:
        """Number of signal directions that count as the residue's."""
        return {"num_outputs": float(self._num_outputs)}

    def state_dict(self) -> dict[str, Any]:
        """Directions at the start and at the last sample, and the phase."""
        return {"known": {name: dict(known) for name, known in self._known.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load them."""
        self._known = {name: dict(known) for name, known in state.get("known", {}).items()}

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_taps": {}, "_losses": []}

    def _of_layer(self, name: str, team: Team) -> Numbers | None:
        tap = self._taps[name]
        gradient, pairs = tap.gradient, None
        try:
            pairs = tap.take()
        except Exception as error:  # the other processes wait for what this one has
            self.trouble = self.trouble or error
        tap.gradient = None
        assert gradient is not None
        if tap.is_computed and team.size > 1:  # of this process's rows: no optimizer gets it
            gradient = team.all_reduce(gradient.float()) / team.size
        gradient = as_matrix(tap.layers[0], gradient)
        pooled = _pooled(pairs, tap.probes(), gradient, self._max_rows, team)
        try:
            if pooled is None:
                why = (
                    "the batch had none, the layer was called in a compiled or mapped function, or its weight was "
                    "used without the layer"
                )
                raise ValueError(f"no row of {name!r} was seen: {why}")
            return self._numbers(name, pooled, gradient)
        except Exception as error:  # one layer, which does no harm to others
            self.trouble = self.trouble or error
            return None

    def _numbers(self, name: str, pairs: Pairs, gradient: Tensor) -> Numbers:
        wide = gradient.to(working_dtype(gradient.device))
        apart = deviation(pairs.product.to(wide), wide @ pairs.probes.to(wide))
        found = anatomy(Sides(pairs.inputs, pairs.signals, wide, pairs.num_rows), self._num_outputs)
        values = found.values | {"deviation": apart} | self._followed(name, found)
        for quantity in OF_THE_PRODUCT:
            values[quantity] = torch.where(apart <= LARGEST_DEVIATION, values[quantity], torch.nan)
        is_finite = torch.isfinite(wide).all()
        blanked = [
            {key: torch.where(is_finite, value, torch.nan) for key, value in part.items()}
            for part in (values, found.errors)
        ]
        tags = [{f"anatomy_{key}": value for key, value in part.items()} for part in blanked]
        return Numbers(name, tags[0], tags[1])

    def _followed(self, name: str, found: Split) -> dict[str, Tensor]:
        """Against the start and the last sample."""
        known = self._known.get(name, {})
        if known and known["start"].shape != found.top.shape:
            known = {}
        nothing = torch.full_like(found.top, torch.nan)
        start, last = (known.get(key, nothing).to(found.top) for key in ("start", "last"))
        dominance = found.values["spike_dominance"]
        ruled = torch.maximum(
            known.get("ruled", torch.zeros_like(dominance)).to(dominance), (dominance < RESIDUE).to(dominance)
        )
        is_finite = torch.isfinite(found.top).all()
        self._known[name] = {
            "start": torch.where(torch.isfinite(start).all(), start, found.top),
            "last": torch.where(is_finite, found.top, last),
            "ruled": ruled,
        }
        shifted = torch.where(torch.isfinite(dominance), ruled * (dominance > SPIKE), torch.nan)
        return {
            "stability": (found.top @ last).abs(),
            "stability_to_start": (found.top @ start).abs(),
            "phase_shift": shifted,
        }


def _owners(module: nn.Module) -> dict[int, list[nn.Module]]:
    """By id of a weight the layers that multiply by it, all of which can be heard."""
    # The projection of an attention is never called as a layer.
    inner = {id(m.out_proj) for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    owners: dict[int, list[nn.Module]] = {}
    for layer in module.modules():
        weight = _stepped(layer) if is_heard(layer) and id(layer) not in inner else None
        if weight is not None and not weight.dtype.is_complex:
            owners.setdefault(id(weight), []).append(layer)
    return owners


def _stepped(layer: nn.Module) -> nn.Parameter | None:
    """The weight of a layer, or the parameter of its shape that a hook computes it from."""
    computed = {one.local: one.largest for one in hooked(layer).values()}
    return computed.get("weight", layer._parameters.get("weight"))


def _names(module: nn.Module, owners: Mapping[int, Sequence[nn.Module]]) -> dict[str, nn.Parameter]:
    """The weights that are whole here, by the first layer that multiplies by each."""
    paths = tags(path for path, _ in module.named_modules())
    of_layer = {id(layer): f"{paths[path]}.weight".lstrip(".") for path, layer in module.named_modules()}
    weights = [(of_layer[id(layers[0])], _stepped(layers[0])) for layers in owners.values()]
    return {name: p for name, p in weights if p is not None and not isinstance(p, DTensor)}


def _has_matrix(layer: nn.Module) -> bool:
    return any(p.requires_grad and not is_lazy(p) and p.ndim > 1 for p in layer.parameters(recurse=False))


def _described(layer: nn.Module) -> str:
    """Its class, and why it is not heard where others of its class are."""
    if isinstance(layer, ParametrizationList):
        return "parametrised weight"
    if not is_heard(layer):
        return type(layer).__name__
    # A parametrised layer has a property that is no parameter.
    weight = _stepped(layer)
    why = "parametrised " if weight is None else "complex " if weight.dtype.is_complex else ""
    return f"{why}{type(layer).__name__}"


def _pooled(pairs: Pairs | None, probes: Tensor, gradient: Tensor, max_rows: int, team: Team) -> Pairs | None:
    """Rows of all processes, a share of each; None where there are none."""
    if team.size == 1:
        return pairs
    outputs, inputs = gradient.shape
    share = -(-max_rows // team.size)
    rows = torch.zeros(team.size, share, inputs + outputs, dtype=torch.float32, device=gradient.device)
    product = torch.zeros(outputs, PROBES, dtype=torch.float32, device=gradient.device)
    if pairs is not None:
        rows[team.rank, : len(pairs.inputs)] = torch.cat([pairs.inputs, pairs.signals], 1)
        product += pairs.product
    rows, product = team.all_reduce(rows), team.all_reduce(product)
    counts = team.all_gather_object((len(pairs.inputs), pairs.num_rows) if pairs is not None else (0, 0))
    if not any(count for count, _ in counts):
        return None
    # One of each process in turn, so that the first ones are a sample too.
    places = [(rank, i) for i in range(share) for rank, (count, _) in enumerate(counts) if i < count]
    at = torch.tensor(places, device=rows.device)
    kept = rows[at[:, 0], at[:, 1]]
    return Pairs(kept[:, :inputs], kept[:, inputs:], sum(count for _, count in counts), product, probes)
