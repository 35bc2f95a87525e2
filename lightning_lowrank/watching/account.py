"""What a monitor says of itself."""

from collections.abc import Sequence

from torchmetrics import Metric

from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.schedules import Budget
from lightning_lowrank.reports.alerts.rules import AlertEvent
from lightning_lowrank.reports.dashboard import Sample
from lightning_lowrank.reports.journal import Journal


class Account:
    """What a monitor can say of its run, and of what it will write."""

    label: str
    budget: Budget | None
    recorders: Sequence[Recorder]
    _journal: Journal

    @property
    def first(self) -> Sample | None:
        """The first number of everything measured, None before."""
        return self._journal.first

    @property
    def latest(self) -> Sample | None:
        """The latest number of everything measured, None before."""
        return self._journal.latest

    @property
    def failures(self) -> int:
        """Numbers that could not be had so far."""
        return self._journal.failures

    @property
    def skipped(self) -> int:
        """Steps that a GradScaler skipped when a sample was due."""
        return self._journal.skipped

    @property
    def events(self) -> list[AlertEvent]:
        """What alerts have told so far."""
        return list(self._journal.alerts.events)

    @property
    def metrics(self) -> dict[str, Metric]:
        """The torchmetrics that hold the numbers of the sample being taken, by probe."""
        return {recorder.name: recorder.means for recorder in self.recorders}

    @property
    def overhead(self) -> float:
        """What this monitor cost so far, in percent of the training time: host time, validation not counted."""
        return self._journal.clock.percent

    def _quantities(self) -> list[str]:
        return [quantity for recorder in self.recorders for quantity in recorder.quantities]

    def _watching(self, stage: str) -> list[Recorder]:
        return [r for r in self.recorders if r.probe.source.stage == stage]

    def _refuse_double(self, other: "Account") -> None:
        both = self._tags() & other._tags()
        if both:
            names = f"monitors {self.label!r} and {other.label!r}"
            raise ValueError(f"{names} would both write {sorted(both)}: give one of them name='...'")
        if self.budget is not None and self.budget is other.budget:
            raise ValueError(f"monitors {self.label!r} and {other.label!r} share one Budget object: give each its own")

    def _tags(self) -> set[str]:
        """What stands in the tags that only this monitor may write."""
        return {self.label, *self._quantities(), *(state.name for state in self._journal.alerts.states)}
