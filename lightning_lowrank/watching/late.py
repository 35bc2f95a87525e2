"""A sample that is read before it is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.sampling import Sampling
from lightning_lowrank.measuring.schedules import Budget
from lightning_lowrank.models.training import Training


@dataclass
class Late:
    """A sample that is read, and of which matrices may still have to be decomposed.

    Attributes:
        sampling: The sample.
        recorders: Those that it is of.
        training: The training.
        step: That it belongs to.
        batches: After how many it is due.
    """

    sampling: Sampling
    recorders: list[Recorder]
    training: Training
    step: int
    batches: int = 0

    def work(self) -> bool:
        """Do a batch's share of what was put off: whether it is the last one, which is done with the report."""
        self.batches -= 1
        if self.batches > 0:
            self.sampling.work(self.batches + 1)
        return self.batches <= 0


def put_off(recorders: Sequence[Recorder], spread: int, training: Training, budget: Budget | None) -> None:
    """Have recorders put decompositions off, in so many parts.

    Not where several processes share them out instead, nor where a budget in its warm-up asks what a sample takes.
    """
    measuring = budget is not None and budget.every is None
    for recorder in recorders:
        recorder.num_parts = 0 if measuring or training.team.size > 1 else spread
