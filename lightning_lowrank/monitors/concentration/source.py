"""How unequally modules, attention heads, neurons and directions share the learning.

Shape letters:  n units
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lowrank.distributed.shards import is_sharded
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Numbers, NumberSource, Quantity, led_by
from lightning_lowrank.measuring.parameter_source import difference
from lightning_lowrank.measuring.source import Batch, Step
from lightning_lowrank.models.effective_weights import InUse
from lightning_lowrank.models.names import chosen_parameters
from lightning_lowrank.models.training import Training
from lightning_lowrank.models.units import Units, heads_of, modules_of, neurons_of
from lightning_lowrank.monitors.concentration.gates import energies, gate_gradients
from lightning_lowrank.monitors.concentration.ledger import (
    GROWTH,
    INEQUALITY,
    OF_A_REFERENCE,
    OF_THE_START,
    Ledger,
    importances_in,
)
from lightning_lowrank.monitors.concentration.tickets import Tickets

UNITS = ("module", "head", "neuron", "direction")
# Gathered unless others are given, as far as the model has them.
USUAL = ("module", "head", "neuron")
SIGNALS = ("gradient", "update", "gate")

# A gate is on what a layer reads; a direction has no name by which it could be found again.
WITHOUT_GATES = ("module", "direction")

# What to do where a kind of units is not found.
NAMED_BY = {
    "head": "name the output projections of its attention, such as heads={'*.attn.out': 8}",
    "neuron": "name the layers that read them, such as neurons=['*.mlp.fc2']",
}

# Masks that a small number per weight can tell apart.
MOST_DENSITIES = 255


class Concentration(NumberSource):
    """Inequality between units in gradient, update and importance (gates), with its value at the start; masks of the
    largest weights.

    Args:
        units: Any of `module`, `head`, `neuron`, `direction` (singular directions of all matrices, which needs an
            eigensolver); by default the first three, if the model has them.
        signals: Any of `gradient` and `update` (energy per entry), `gate` (importance of heads and neurons: how the
            loss changes when they are scaled).
        densities: Shares of the weights that the masks keep; an empty list for no masks.
        match: Parameters: globs on the full name, `re:REGEX`, `type:LAYERCLASS`.
        exclude: Patterns of what to leave out, as for `match`.
        heads: Number of heads by pattern, for output projections that are not recognised.
        neurons: Layers whose inputs are neurons; by default pairs of layers.
        reference: Checkpoint of another run with this source, with which importances are compared.
        seed: Seed for the choice of weights in the masks of large models.

    Raises:
        ValueError: An option is unknown or out of range, or the reference has no importances. In `plan`: a pattern
            matches nothing, the model has no units of a requested kind, or parameters are sharded.
    """

    name = "concentration"
    level = "subnetworks"
    absent: Collection[str]
    _seen: tuple[tuple[str, int, bool, bool], ...]

    def __init__(
        self,
        units: Sequence[str] | None = None,
        signals: Sequence[str] = ("gradient", "update", "gate"),
        *,
        densities: Sequence[float] = (0.1, 0.5),
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        heads: Mapping[str, int] | None = None,
        neurons: str | Sequence[str] | None = None,
        reference: str | PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        self._named, units = units is not None, USUAL if units is None else units
        _refuse(units, signals, densities, heads)
        # In one order, whatever they are given in: it is part of the name of their state in a checkpoint.
        self._units, self._signals = (
            [one for one in known if one in given] for known, given in ((UNITS, units), (SIGNALS, signals))
        )
        self._match, self._exclude, self._heads, self._neurons = match, exclude, dict(heads or {}), neurons
        self._reference = {} if reference is None else importances_in(reference)
        if self._reference and not set(self._reference) & {f"{unit}_gate" for unit in units if "gate" in signals}:
            raise ValueError(
                f"reference has {list(self._reference)}, and units={list(units)}, signals={list(signals)} include "
                "none of these"
            )
        self._tickets = Tickets(densities, seed=seed) if densities else None
        self._keys = [(u, s) for u in self._units for s in self._signals if s != "gate" or u not in WITHOUT_GATES]
        self._ledgers = {f"{unit}_{signal}": Ledger() for unit, signal in self._keys}
        given = [Quantity(f"concentration_{name}", per_site=name == "head_importance") for name in self._names()]
        self.quantities = led_by(self._core, given, looked_up=("_start",))
        self._look_again()
        self._parts: dict[str, list[Units]] = {}
        self._matrices: list[nn.Parameter] = []
        self._in_use = InUse()
        self._read: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._before: dict[int, Tensor] = {}
        self._weights: dict[str, Tensor] | None = None

    def plan(self, training: Training) -> None:
        """Choose the trained parameters; choose again only if parameters were added, removed, frozen or unfrozen."""
        module = training.module
        chosen = chosen_parameters(module, self._match, self._exclude)
        self._in_use = InUse(module)
        seen = tuple(
            (name, id(parameter), parameter.requires_grad, is_lazy(parameter)) for name, parameter in chosen.items()
        )
        if seen == self._seen:
            return
        sharded = next((name for name, parameter in chosen.items() if is_sharded(parameter)), None)
        if sharded is not None:
            raise ValueError(
                f"ConcentrationMonitor: {sharded!r} is sharded, but units must be read whole; use DDP, or choose "
                "other weights with match"
            )
        shaped = {name: parameter for name, parameter in chosen.items() if not is_lazy(parameter) and parameter.numel()}
        if not any(map(is_lazy, chosen.values())):  # they may still turn out to be anything
            self._refuse_missing(self._found(module, shaped))
        trained = {name: parameter for name, parameter in shaped.items() if parameter.requires_grad}
        self._parts = {unit: parts for unit, parts in self._found(module, trained).items() if unit in self._units}
        self._matrices = [parameter for parameter in shaped.values() if parameter.ndim > 1]
        there = {unit for unit, parts in self._parts.items() if parts}
        self.absent = {name for name in self.absent if name.split("_")[1] not in there}
        self._seen = seen

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        kept = {"_seen": (), "_parts": {}, "_matrices": [], "_in_use": InUse()}
        return vars(self) | kept | {"_read": {}, "_before": {}, "_weights": None}

    def labels(self) -> list[str]:
        """The whole model, and its heads."""
        return [WHOLE_MODEL, *(label for part in self._headed for label in _labels(part))]

    def batch_begins(self, batch: Batch) -> None:
        """Read the weights, once in a sample."""
        if self._weights is None and self._tickets is not None:
            found = self._tickets.compared([self._in_use(p, p.detach()) for p in self._matrices])
            self._weights = {f"concentration_{name}": value for name, value in found.items()}

    def gradients_final(self, step: Step) -> list[Any]:
        """Read gradients and gates; keep the weights to compute the update."""
        for unit, part in self._stepping(step):
            found = [(p, p.grad) for p in part.parameters if p.grad is not None]
            gradients = [self._in_use(p, grad.to_dense() if grad.is_sparse else grad) for p, grad in found]
            if len(gradients) < len(part.parameters):
                continue  # what was not used has no gradient, which is not the same as a small one
            scale = 1.0 if step.scale is None else step.scale
            self._note(unit, "gradient", part, partial(_energy, unit, part, gradients), scale**2)
            self._note(unit, "gate", part, partial(_importance, part, gradients[0]), scale)
            if "update" in self._signals:
                self._before |= {id(p): p.detach().clone() for p in part.parameters if id(p) not in self._before}
        return []

    def step_done(self, step: Step) -> list[Any]:
        """Read the update."""
        for unit, part in self._stepping(step):
            if all(id(p) in self._before for p in part.parameters):
                moves = [self._in_use(p, difference(p.detach(), self._before[id(p)])) for p in part.parameters]
                self._note(unit, "update", part, partial(_energy, unit, part, moves))
        for parameter in step.parameters:
            self._before.pop(parameter, None)
        return []

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """The results, the same on every process."""
        counts = {unit: sum(part.count for part in self._parts.get(unit, ())) for unit in self._units}
        values = {f"concentration_{unit}_count": torch.tensor(float(count)) for unit, count in counts.items()} | (
            self._weights or {}
        )
        for (unit, signal), rows in self._read.items():
            ledger = self._ledgers[f"{unit}_{signal}"]
            found = ledger.entered(rows)
            if signal == "gate":
                found |= ledger.against(self._reference.get(f"{unit}_gate", {}))
            values |= {f"concentration_{unit}_{signal}_{name}": value for name, value in found.items()}
        if read := [row for rows in self._read.values() for row in rows.values()]:
            # One that is not finite makes all inequality blank: the sample is lost, and counted, as those of other
            # monitors are.
            sound = torch.cat(read).isfinite().all()
            values = {name: torch.where(sound, value, torch.nan) for name, value in values.items()}
        heads = list(self._of_heads())
        self._drop()
        return [Numbers(WHOLE_MODEL, values), *heads]

    def detach(self) -> None:
        """Drop the unfinished sample."""
        self._drop()

    def facts(self) -> dict[str, float]:
        """Memory of masks and sums, once there are some."""
        kept = [
            row for ledger in self._ledgers.values() for rows in ledger.state_dict().values() for row in rows.values()
        ]
        num_bytes = sum(row.nbytes for row in kept) + (self._tickets.num_bytes if self._tickets else 0)
        return {"bytes": float(num_bytes)} if num_bytes else {}

    def note(self) -> str:
        """What it measures."""
        counts = {unit: sum(part.count for part in parts) for unit, parts in self._parts.items()}
        return "of " + ", ".join(f"{count:,} {unit}s" for unit, count in counts.items()) if counts else ""

    def state_dict(self) -> dict[str, Any]:
        """The sums and the masks."""
        ledgers = {name: ledger.state_dict() for name, ledger in self._ledgers.items()}
        return {"ledgers": ledgers, "tickets": self._tickets.state_dict() if self._tickets else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load them; the units are searched again."""
        self._look_again()
        for name, ledger in self._ledgers.items():
            ledger.load_state_dict(state.get("ledgers", {}).get(name, {}))
        if self._tickets:
            self._tickets.load_state_dict(state.get("tickets", {}))

    @property
    def _headed(self) -> list[Units]:
        return self._parts.get("head", []) if ("head", "gate") in self._keys else []

    @property
    def _core(self) -> list[str]:
        """What every logger gets: one number each of who carries the learning; whether the first mask has settled."""
        asked = [(unit, signal) for unit, signal in self._keys if unit == "module" or signal == "gate"]
        masks = [name for name in self._tickets.names if "early_bird" in name][:1] if self._tickets else []
        return [f"concentration_{name}" for name in (*(f"{unit}_{signal}_gini" for unit, signal in asked), *masks)]

    def _look_again(self) -> None:
        """For a run to come, of whose model nothing is known; a kind of units that it has had and lost is a gap, and
        not absent.
        """
        self._seen = ()
        self.absent = {quantity.name for quantity in self.quantities if quantity.name.split("_")[1] in self._units}

    def _drop(self) -> None:
        self._read, self._before, self._weights = {}, {}, None

    def _names(self) -> Iterator[str]:
        yield from (f"{unit}_count" for unit in self._units)
        for unit, signal in self._keys:
            of_gates = OF_A_REFERENCE if signal == "gate" and self._reference else ()
            named = (*(GROWTH if unit != "direction" else ()), *(OF_THE_START if signal == "gate" else ()))
            names = [name + end for name in INEQUALITY for end in ("", "_start")]
            yield from (f"{unit}_{signal}_{name}" for name in (*names, *named, *of_gates))
        yield from self._tickets.names if self._tickets else ()
        if ("head", "gate") in self._keys:
            yield "head_importance"

    def _refuse_missing(self, found: Mapping[str, Sequence[Units]]) -> None:
        """Units that were named, and a reference of which nothing is here: frozen ones are, since they may thaw."""
        missing = next((unit for unit in self._units if not found[unit]), None)
        if self._named and missing is not None:
            counts = ", ".join(f"{sum(part.count for part in parts):,} {unit}s" for unit, parts in found.items())
            advice = NAMED_BY.get(missing, "all parameters are vectors, or none is watched")
            raise ValueError(f"units={self._units}: found no {missing}s; {advice}. Found: {counts}")
        theirs = {name: len(row) for rows in self._reference.values() for name, row in rows.items()}
        ours = {part.name: part.count for unit in self._units if unit not in WITHOUT_GATES for part in found[unit]}
        if theirs and not theirs.items() & ours.items():
            both = (dict(sorted(counts.items())[:5]) for counts in (theirs, ours))
            raise ValueError(
                "reference: it has importances of {}, and here are {}. They have none in common".format(*both)
            )

    def _found(self, module: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, list[Units]]:
        """All kinds of parts that are trained."""
        heads = heads_of(module, self._heads)
        neurons = neurons_of(module, self._neurons, list(heads))
        ids = set(map(id, trained.values()))
        kinds = {"head": heads.values(), "neuron": neurons.values()}
        read = {unit: [part for part in parts if id(part.parameters[0]) in ids] for unit, parts in kinds.items()}
        matrices = [Units(name, (p,), count=min(p.flatten(1).shape)) for name, p in trained.items() if p.ndim > 1]
        return {"module": modules_of(trained), **read, "direction": matrices}

    def _stepping(self, step: Step) -> list[tuple[str, Units]]:
        return [
            (unit, part)
            for unit, parts in self._parts.items()
            for part in parts
            if id(part.parameters[0]) in step.parameters
        ]

    def _note(
        self, unit: str, signal: str, part: Units, measure: Callable[[], Tensor], scale: float | Tensor = 1.0
    ) -> None:
        if (unit, signal) in self._keys:
            self._read.setdefault((unit, signal), {})[part.name] = measure() / scale

    def _of_heads(self) -> Iterator[Numbers]:
        rows = self._read.get(("head", "gate"), {})
        for part in self._headed:
            if part.name in rows:
                now, recent = rows[part.name], self._ledgers["head_gate"].recent[part.name]
                for label, value in zip(
                    _labels(part), torch.where(now.isfinite(), recent, torch.nan).unbind(), strict=True
                ):
                    yield Numbers(label, {"concentration_head_importance": value})


def _energy(unit: str, part: Units, tensors: Sequence[Tensor]) -> Tensor:
    """Mean square per unit."""
    if unit == "direction":
        # A sketch has no value of each direction.
        (spectrum,) = decompose([tensors[0].detach().flatten(1)], "values", sketch_above=sys.maxsize).spectra
        return spectrum.magnitudes.square() / tensors[0].numel()
    if part.count == 1 and len(tensors) > 1:
        sizes = [tensor.numel() for tensor in tensors]
        means = [energies(tensor) * size for tensor, size in zip(tensors, sizes, strict=True)]
        return torch.stack(means).sum(0) / sum(sizes)
    return energies(tensors[0], part.count, part.axis)


def _importance(part: Units, gradient: Tensor) -> Tensor:
    return gate_gradients(part.parameters[0], gradient, part.count, part.axis).abs()


def _labels(part: Units) -> list[str]:
    return [f"{part.name}.h{i}" for i in range(part.count)]


def _refuse(
    units: Sequence[str], signals: Sequence[str], densities: Sequence[float], heads: Mapping[str, int] | None
) -> None:
    for argument, given, known in (("units", units, UNITS), ("signals", signals, SIGNALS)):
        listed = isinstance(given, Collection) and not isinstance(given, str)
        if not listed or not given or not all(one in known for one in given):
            raise ValueError(f"{argument}={given!r} must be a list of one or more of {list(known)}")
    if set(signals) == {"gate"} and set(units) <= set(WITHOUT_GATES):
        raise ValueError(
            f"units={list(units)} have no gates; only heads and neurons have gates. Other units have 'gradient' and "
            "'update'"
        )
    if not (heads is None or isinstance(heads, Mapping)):
        raise ValueError(
            f"heads={heads!r}: expected a mapping from patterns of layers to numbers of heads, such as "
            "{'*.attn.out': 8}"
        )
    shares = isinstance(densities, Sequence) and all(
        isinstance(density, float) and 0 < density < 1 for density in densities
    )
    if not shares or len({f"{density:g}" for density in densities}) < len(densities) or len(densities) > MOST_DENSITIES:
        most = f"expected a list of at most {MOST_DENSITIES} different shares of the weights"
        raise ValueError(
            f"densities={densities!r}: {most}, each above 0 and below 1 and different in the first six digits; [] "
            "means no masks"
        )
