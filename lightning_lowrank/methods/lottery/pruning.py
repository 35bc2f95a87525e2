"""What is pruned: weights by magnitude, or whole units by what gates on them do to the loss.

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
    "head": "name the output projections of its attention, heads={'*.attn.out': 8}",
    "neuron": "name the layers that read them, neurons=['*.mlp.fc2']",
}

Weights = Mapping[str, nn.Parameter]


class Pruning(ABC):
    """Chooses what may go, and scores it.

    Attributes:
        unit: What is counted, in messages.
        one_each: No layer loses all.
    """

    unit: str
    one_each: bool

    @abstractmethod
    def find(self, module: nn.Module) -> tuple[dict[str, nn.Parameter], Mapping[str, str]]:
        """The weights that get masks, by tag, and what is left out, with the reason.

        Raises:
            ValueError: There is none.
        """

    @abstractmethod
    def pools(self, weights: Weights) -> list[dict[str, int]]:
        """What is compared with one another: how many there are, by tag of the weight."""

    @abstractmethod
    def scores(self, tag: str, weight: Tensor) -> Tensor:
        """How much each of a weight matters; none is negative."""

    @abstractmethod
    def reduced(self, tag: str, mask: Tensor) -> Tensor:
        """Which are there, of the mask of a weight."""

    @abstractmethod
    def spread(self, tag: str, there: Tensor, weight: Tensor) -> Bool[Tensor, "..."]:
        """The mask of a weight, of which are there."""

    def hear(self, weights: Weights, parameters: Collection[int]) -> None:
        """Gradients are final, of the parameters with these ids."""

    def compared(self, weights: Weights) -> list[Tensor]:
        """What tells whether the mask of the next round has settled; nothing as long as nothing is known."""
        return [self.scores(tag, weight) for tag, weight in weights.items()]

    def forget(self) -> None:
        """Of the round that is over."""

    def state_dict(self) -> dict[str, Tensor]:
        """What was heard."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], weights: Weights) -> None:
        """Take it back."""

    def masks(
        self, weights: Weights, before: Mapping[str, Tensor], prune: float, rounds: int, scope: Scope
    ) -> dict[str, Tensor]:
        """Of the largest that are left, after so many prunings in all."""
        found: dict[str, Tensor] = {}
        for pool in self.pools(weights):
            scores = [self.scores(tag, weights[tag]) for tag in pool]
            there = [self.reduced(tag, before[tag]) if tag in before else None for tag in pool]
            rows = pruned(scores, there, prune, rounds, scope, one_each=self.one_each)
            found |= {tag: self.spread(tag, row, weights[tag]) for tag, row in zip(pool, rows, strict=True)}
        return {tag: found[tag] for tag in weights}

    def num_left(self, weights: Weights, prune: float, rounds: int, scope: Scope) -> int:
        """How many are there after so many prunings."""
        return sum(
            max(kept(sum(pool.values()), prune, rounds), self.one_each * len(pool))
            if scope == "global"
            else sum(kept(count, prune, rounds) for count in pool.values())
            for pool in self.pools(weights)
        )

    def num_all(self, weights: Weights) -> int:
        """How many there were."""
        return sum(sum(pool.values()) for pool in self.pools(weights))


@dataclass(eq=False)
class Magnitudes(Pruning):
    """Single weights, by their magnitude.

    Attributes:
        match: Patterns of the parameters.
        exclude: The same, taken away.
    """

    match: Patterns
    exclude: Patterns
    unit: str = "entries"
    one_each: bool = False

    def find(self, module: nn.Module) -> tuple[dict[str, nn.Parameter], Mapping[str, str]]:
        """Matrices; embeddings must be matched to be among them.

        Raises:
            ValueError: A pattern fits none, or there is no matrix.
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
        """All with one another."""
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
    """Whole units, by the mean size of the gradient of a gate on each over the steps of the round.

    A unit is gone when nothing reads it: its columns of the weight that does are zeros.

    Attributes:
        kinds: "neuron", "head", or both; each kind is compared with itself.
        match: Patterns of the weights that read them.
        exclude: The same, taken away.
        heads: Number of heads by pattern of output projections that are not found.
        neurons: Layers whose inputs are neurons; pairs of layers unless given.
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
            ValueError: A pattern fits none, or a kind of units is not there.
        """
        known = {id(p): tag for tag, p in chosen_parameters(module, self.match, self.exclude).items()}
        weights: dict[str, nn.Parameter] = {}
        for kind, parts in self._parts(module):
            found = {known[id(p)]: part for part in parts for p in part.parameters if id(p) in known}
            found = {tag: part for tag, part in found.items() if tag not in weights}
            if not found:
                raise ValueError(f"LotteryTicket(units={list(self.kinds)}): no {kind}s are found; {NAMED_BY[kind]}")
            self._tags[kind] = list(found)
            self._lie |= {tag: (part.axis, part.count) for tag, part in found.items()}
            weights |= {tag: part.parameters[0] for tag, part in found.items()}
        return weights, {}

    def _parts(self, module: nn.Module) -> Iterator[tuple[str, Collection[Units]]]:
        heads = heads_of(module, self.heads)
        found = {"head": heads, "neuron": neurons_of(module, self.neurons, list(heads))}
        return ((kind, found[kind].values()) for kind in self.kinds)

    def pools(self, weights: Weights) -> list[dict[str, int]]:
        """Each kind by itself."""
        pools = [{tag: self._lie[tag][1] for tag in self._tags[kind] if tag in weights} for kind in self.kinds]
        return [pool for pool in pools if pool]

    def hear(self, weights: Weights, parameters: Collection[int]) -> None:
        """Read the gates. Of a step that is not finite, as a GradScaler skips, nothing is kept."""
        for tag, weight in weights.items():
            if weight.grad is not None and id(weight) in parameters:
                axis, count = self._lie[tag]
                row = gate_gradients(weight, weight.grad, count, axis).abs()
                row = torch.where(row.isfinite().all(), row, 0)
                self._sums[tag] = self._sums[tag] + row if tag in self._sums else row

    def scores(self, tag: str, weight: Tensor) -> Float[Tensor, " G"]:
        """Shares of the layer's length: sizes of gates of different layers are no measure of one another."""
        row = self._sums.get(tag)
        return (
            torch.zeros(self._lie[tag][1], device=weight.device) if row is None else nn.functional.normalize(row, dim=0)
        )

    def reduced(self, tag: str, mask: Tensor) -> Bool[Tensor, " G"]:
        """Units that something reads."""
        axis, count = self._lie[tag]
        return blocks(mask.byte(), count, axis).any(1)

    def spread(self, tag: str, there: Tensor, weight: Tensor) -> Bool[Tensor, "..."]:
        """Their columns."""
        axis, count = self._lie[tag]
        along = there.repeat_interleave(weight.shape[axis] // count)
        shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
        return along.view(shape).expand(weight.shape).clone()

    def compared(self, weights: Weights) -> list[Tensor]:
        """Scores, once there are gradients."""
        return super().compared(weights) if self._sums else []

    def forget(self) -> None:
        """Gates of the round that is over."""
        self._sums = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Sums of sizes, by tag."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor], weights: Weights) -> None:
        """Take them back, to where the weights are."""
        self._sums = {tag: row.to(weights[tag].device) for tag, row in state.items() if tag in weights}


def pruning_of(
    units: Unit | Sequence[Unit],
    match: Patterns,
    exclude: Patterns,
    heads: Mapping[str, int] | None,
    neurons: str | Sequence[str] | None,
) -> Pruning:
    """What was asked for.

    Raises:
        ValueError: No such units, or options of others.
    """
    kinds = (units,) if isinstance(units, str) else tuple(units)
    if kinds == ("weight",):
        if heads is not None or neurons is not None:
            raise ValueError(f"heads={heads}, neurons={neurons}: give units=('neuron', 'head') to prune these")
        return Magnitudes(match, exclude)
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= NAMED_BY.keys():
        raise ValueError(f"units={units!r}: 'weight', or one or both of 'neuron' and 'head'")
    return Gates(tuple(sorted(kinds)), match, exclude, dict(heads or {}), neurons)
