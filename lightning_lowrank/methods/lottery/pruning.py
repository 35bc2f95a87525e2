"""What is pruned: weights by magnitude, or whole units by gates on them.

Shape letters:  G units of a layer
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_lowrank.methods.lottery.masks import Scope, kept, pruned
from lightning_lowrank.methods.matrices import Patterns, is_matrix, unusual
from lightning_lowrank.models.names import chosen_parameters
from lightning_lowrank.models.units import Units, heads_of, neurons_of
from lightning_lowrank.monitors.concentration.gates import blocks, gate_gradients

Unit = Literal["weight", "neuron", "head"]
# What to do where a kind of units is not found.
NAMED_BY = {
    "head": "name the output projections of its attention, such as heads={'*.attn.out': 8}",
    "neuron": "name the layers that read them, such as neurons=['*.mlp.fc2']",
}

Weights = Mapping[str, nn.Parameter]


class Pruning(ABC):
    """Chooses candidates for pruning, and scores them.

    Attributes:
        unit: The counted unit, in messages.
        one_each: Whether each layer keeps at least one.
    """

    unit: str
    one_each: bool

    @abstractmethod
    def find(self, module: nn.Module) -> tuple[dict[str, nn.Parameter], Mapping[str, str]]:
        """The weights that get masks, by tag, and those that are left out, with the reason.

        Raises:
            ValueError: There are none.
        """

    @abstractmethod
    def pools(self, weights: Weights) -> list[dict[str, int]]:
        """Groups that are compared within themselves: number of units, by tag of the weight."""

    @abstractmethod
    def scores(self, tag: str, weight: Tensor) -> Tensor:
        """Importance of each unit of a weight; never negative."""

    @abstractmethod
    def reduced(self, tag: str, mask: Tensor) -> Tensor:
        """Which units exist, from the mask of a weight."""

    @abstractmethod
    def spread(self, tag: str, there: Tensor, weight: Tensor) -> Bool[Tensor, "..."]:
        """The mask of a weight, from the units that exist."""

    def hear(self, weights: Weights, parameters: Collection[int]) -> None:
        """Read the final gradients of the parameters with these ids."""

    def compared(self, weights: Weights) -> list[Tensor]:
        """Scores that show whether the mask of the next round has settled; None as long as nothing is known."""
        return [self.scores(tag, weight) for tag, weight in weights.items()]

    def forget(self) -> None:
        """Forget the finished round."""

    def state_dict(self) -> dict[str, Tensor]:
        """What was read so far."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], weights: Weights) -> None:
        """Load it."""

    def masks(
        self, weights: Weights, before: Mapping[str, Tensor], prune: float, rounds: int, scope: Scope
    ) -> dict[str, Tensor]:
        """Masks of the largest remaining units, after a number of prunings in total."""
        found: dict[str, Tensor] = {}
        for pool in self.pools(weights):
            scores = [self.scores(tag, weights[tag]) for tag in pool]
            there = [self.reduced(tag, before[tag]) if tag in before else None for tag in pool]
            rows = pruned(scores, there, prune, rounds, scope, one_each=self.one_each)
            found |= {tag: self.spread(tag, row, weights[tag]) for tag, row in zip(pool, rows, strict=True)}
        return {tag: found[tag] for tag in weights}

    def num_left(self, weights: Weights, prune: float, rounds: int, scope: Scope) -> int:
        """Number of units after some prunings."""
        return sum(
            max(kept(sum(pool.values()), prune, rounds), self.one_each * len(pool))
            if scope == "global"
            else sum(kept(count, prune, rounds) for count in pool.values())
            for pool in self.pools(weights)
        )

    def num_all(self, weights: Weights) -> int:
        """Number of units at the start."""
        return sum(sum(pool.values()) for pool in self.pools(weights))


@dataclass(eq=False)
class Magnitudes(Pruning):
    """Single weights, by magnitude.

    Attributes:
        match: Patterns of the parameters.
        exclude: Patterns of parameters to leave out.
    """

    match: Patterns
    exclude: Patterns
    unit: str = "entries"
    one_each: bool = False

    def find(self, module: nn.Module) -> tuple[dict[str, nn.Parameter], Mapping[str, str]]:
        """Matrices; embeddings only if they are matched.

        Raises:
            ValueError: A pattern matches nothing, or there is no matrix.
        """
        chosen = chosen_parameters(module, self.match, self.exclude)
        found = {tag: p for tag, p in chosen.items() if is_matrix(p)}
        if not found:
            names = [name for name, _ in module.named_parameters()][:10]
            raise ValueError(f"LotteryTicket finds no matrix among {names}")
        odd = {} if self.match is not None else unusual(module, found)
        left_out = {tag: why for tag, why in odd.items() if why != "head"}
        return {tag: p for tag, p in found.items() if tag not in left_out}, left_out

    def pools(self, weights: Weights) -> list[dict[str, int]]:
        """All weights are compared with one another."""
        return [{tag: weight.numel() for tag, weight in weights.items()}]

    def scores(self, tag: str, weight: Tensor) -> Tensor:
        """Magnitudes."""
        return weight.detach().abs()

    def reduced(self, tag: str, mask: Tensor) -> Tensor:
        """The mask itself."""
        return mask

    def spread(self, tag: str, there: Tensor, weight: Tensor) -> Bool[Tensor, "..."]:
        """The same."""
        return there


@dataclass(eq=False)
class Gates(Pruning):
    """Whole units, by the mean absolute gradient of a gate on each over the steps of the round.

    A unit is gone if nothing reads it: its columns of the weight that reads it are zero.

    Attributes:
        kinds: "neuron", "head", or both; each kind is compared within itself.
        match: Patterns of the weights that read the units.
        exclude: Patterns of weights to leave out.
        heads: Number of heads by pattern of output projections, for attention that is not recognised.
        neurons: Layers whose inputs are neurons. Default: pairs of layers.
    """

    kinds: tuple[str, ...]
    match: Patterns
    exclude: Patterns
    heads: Mapping[str, int]
    neurons: str | Sequence[str] | None
    unit: str = "units"
    one_each: bool = True
    # By tag: the axis along which units lie, and how many.
    _lie: dict[str, tuple[int, int]] = field(default_factory=dict)
    _tags: dict[str, list[str]] = field(default_factory=dict)
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def find(self, module: nn.Module) -> tuple[dict[str, nn.Parameter], Mapping[str, str]]:
        """Weights that read units.

        Raises:
            ValueError: A pattern matches nothing, or there are no units of a kind.
        """
        known = {id(p): tag for tag, p in chosen_parameters(module, self.match, self.exclude).items()}
        weights: dict[str, nn.Parameter] = {}
        for kind, parts in self._parts(module):
            found = {known[id(p)]: part for part in parts for p in part.parameters if id(p) in known}
            found = {tag: part for tag, part in found.items() if tag not in weights}
            if not found:
                raise ValueError(f"LotteryTicket(units={list(self.kinds)}): found no {kind}s; {NAMED_BY[kind]}")
            self._tags[kind] = list(found)
            self._lie |= {tag: (part.axis, part.count) for tag, part in found.items()}
            weights |= {tag: part.parameters[0] for tag, part in found.items()}
        return weights, {}

    def _parts(self, module: nn.Module) -> Iterator[tuple[str, Collection[Units]]]:
        heads = heads_of(module, self.heads)
        found = {"head": heads, "neuron": neurons_of(module, self.neurons, list(heads))}
        return ((kind, found[kind].values()) for kind in self.kinds)

    def pools(self, weights: Weights) -> list[dict[str, int]]:
        """Each kind is compared within itself."""
        pools = [{tag: self._lie[tag][1] for tag in self._tags[kind] if tag in weights} for kind in self.kinds]
        return [pool for pool in pools if pool]

    def hear(self, weights: Weights, parameters: Collection[int]) -> None:
        """Read the gates. Steps that are not finite, which a GradScaler skips, are ignored."""
        for tag, weight in weights.items():
            if weight.grad is not None and id(weight) in parameters:
                axis, count = self._lie[tag]
                row = gate_gradients(weight, weight.grad, count, axis).abs()
                row = torch.where(row.isfinite().all(), row, 0)
                self._sums[tag] = self._sums[tag] + row if tag in self._sums else row

    def scores(self, tag: str, weight: Tensor) -> Float[Tensor, " G"]:
        """Absolute gates divided by the norm of their layer, since sizes of different layers are not comparable."""
        row = self._sums.get(tag)
        return (
            torch.zeros(self._lie[tag][1], device=weight.device) if row is None else nn.functional.normalize(row, dim=0)
        )

    def reduced(self, tag: str, mask: Tensor) -> Bool[Tensor, " G"]:
        """Units that a layer reads."""
        axis, count = self._lie[tag]
        return blocks(mask.byte(), count, axis).any(1)

    def spread(self, tag: str, there: Tensor, weight: Tensor) -> Bool[Tensor, "..."]:
        """Columns of the units."""
        axis, count = self._lie[tag]
        along = there.repeat_interleave(weight.shape[axis] // count)
        shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
        return along.view(shape).expand(weight.shape).clone()

    def compared(self, weights: Weights) -> list[Tensor]:
        """Scores, once there are gradients."""
        return super().compared(weights) if self._sums else []

    def forget(self) -> None:
        """Forget the gates of the finished round."""
        self._sums = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Sums of absolute gates, by tag."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor], weights: Weights) -> None:
        """Load them, onto the devices of the weights."""
        self._sums = {tag: row.to(weights[tag].device) for tag, row in state.items() if tag in weights}


def pruning_of(
    units: Unit | Sequence[Unit],
    match: Patterns,
    exclude: Patterns,
    heads: Mapping[str, int] | None,
    neurons: str | Sequence[str] | None,
) -> Pruning:
    """The options as a `Pruning`.

    Raises:
        ValueError: The units are unknown, or an option belongs to other units.
    """
    kinds = (units,) if isinstance(units, str) else tuple(units)
    if kinds == ("weight",):
        if heads is not None or neurons is not None:
            raise ValueError(f"heads={heads}, neurons={neurons}: to prune these, give units=('neuron', 'head')")
        return Magnitudes(match, exclude)
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= NAMED_BY.keys():
        raise ValueError(f"units={units!r} must be 'weight', or one or both of 'neuron' and 'head'")
    return Gates(tuple(sorted(kinds)), match, exclude, dict(heads or {}), neurons)
