"""When a dense run is factorized, and at which ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.methods.factorize.choice import Chosen, When
from lightning_lowrank.methods.factorize.factors import wide
from lightning_lowrank.statistics.stable_rank import stable_rank

# Samples whose stable ranks are compared, and by what share the largest may exceed the smallest.
NUM_SETTLED, SPREAD = 5, 0.05
# Samples from the start after which the rank of the updates is measured.
NUM_MEASURED = 3


@dataclass(eq=False)
class Waiting:
    """Samples of dense weights.

    Attributes:
        when: The condition.
        every: Steps between samples.
        chosen: Weights to factorize; empty after they have been factorized.
        start: Initial values, by name, of the weights whose updates are measured.
        stable_ranks: Stable ranks of the samples so far, by name.
        num_samples: Number of samples so far.
        last: Step of the last sample.
        is_over: Whether the ranks are decided.
    """

    when: When
    every: int
    chosen: Sequence[Chosen] = ()
    start: dict[str, Tensor] = field(default_factory=dict)
    stable_ranks: dict[str, list[float]] = field(default_factory=dict)
    num_samples: int = 0
    last: int = 0
    is_over: bool = False

    @property
    def is_on(self) -> bool:
        """Whether something is still to be decided."""
        return bool(self.chosen)

    def begin(self, chosen: Sequence[Chosen], is_continued: bool) -> None:
        """Start to sample."""
        self.chosen = chosen
        if is_continued:
            self.chosen = () if self.is_over else chosen
        else:
            self.start = {one.name: one.matrix().cpu().clone() for one in chosen if one.rank == "measured"}
            self.stable_ranks, self.num_samples, self.last, self.is_over = {}, 0, 0, False

    def sampled(self, step: int) -> dict[str, int] | None:
        """Take a sample after a batch if one is due. Returns the ranks by name after the last sample."""
        if step == self.last or step % self.every:
            return None
        matrices = {one.name: one.matrix() for one in self.chosen}
        if not all(matrix.isfinite().all() for matrix in matrices.values()):
            return None
        self.num_samples, self.last = self.num_samples + 1, step
        for name, matrix in matrices.items():
            value = float(stable_rank(svd(wide(matrix))))
            self.stable_ranks[name] = [*self.stable_ranks.get(name, []), value][-NUM_SETTLED:]
        if not self._is_decided():
            return None
        ranks = {one.name: self._rank(one, matrices[one.name]) for one in self.chosen}
        self.chosen, self.start, self.is_over = (), {}, True
        return ranks

    def state_dict(self) -> dict[str, Any]:
        """Samples so far."""
        kept = {"start": self.start, "stable_ranks": {name: list(v) for name, v in self.stable_ranks.items()}}
        return kept | {"num_samples": self.num_samples, "last": self.last, "is_over": self.is_over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with these samples."""
        self.start, self.stable_ranks = dict(state["start"]), dict(state["stable_ranks"])
        self.num_samples, self.last, self.is_over = state["num_samples"], state["last"], state["is_over"]
        if self.is_over:
            self.chosen = ()

    def _is_decided(self) -> bool:
        if self.when == "start":
            return self.num_samples >= NUM_MEASURED
        return all(_has_settled(values) for values in self.stable_ranks.values())

    def _rank(self, one: Chosen, matrix: Tensor) -> int:
        if one.rank is None:
            return min(ceil(self.stable_ranks[one.name][-1]), *one.shape)
        if one.rank == "measured":
            matrix = wide(matrix) - self.start[one.name].to(matrix.device)
        return one.settled_rank(matrix)


def _has_settled(values: Sequence[float]) -> bool:
    return len(values) == NUM_SETTLED and max(values) <= (1 + SPREAD) * min(values)
