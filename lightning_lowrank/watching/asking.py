"""The schedules of a monitor's probes, which are asked at every step."""

from collections.abc import Sequence

from lightning_lowrank.measuring.probe import due_at
from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.schedules import shared_budget
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.journal import Journal


class Asking:
    """Says which probes are due. Nothing of torch is touched, so that a step takes next to nothing.

    Args:
        recorders: Those that measure in training.

    Attributes:
        budget: The one of all schedules; None without.
        checked: The step that they were asked about last.
    """

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._schedules = [(recorder, due_at(recorder.probe)) for recorder in recorders]
        self.budget = shared_budget([schedule for _, schedule in self._schedules])
        self.checked = -1

    def rests(self, step: int) -> bool:
        """Whether nobody has to be asked, nor the clock."""
        return self.budget is not None and self.budget.rests(step)

    def due(self, training: Training, journal: Journal) -> list[Recorder]:
        """What has become due with this batch; what a schedule raises is raised."""
        begun, step = journal.clock.now(), training.step
        if step == self.checked:
            return []
        try:
            journal.step_begins(step, training)
            due = [recorder for recorder, is_due in self._schedules if is_due(step)]
            self.checked = step
        finally:
            journal.clock.since(begun)
        return due
