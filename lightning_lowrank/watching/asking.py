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
        self._recorders = recorders
        self.budget = shared_budget([due_at(recorder.probe) for recorder in recorders])
        self.checked = -1

    def rests(self, step: int, journal: Journal) -> bool:
        """Whether nobody has to be asked, nor the clock."""
        if self.budget is None or not self.budget.rests(step):
            return False
        journal.clock.rests()
        return True

    def due(self, training: Training, journal: Journal) -> list[Recorder]:
        """What has become due with this batch; what a schedule raises is raised."""
        begun, step = journal.clock.now(), training.step
        if step == self.checked:
            return []
        try:
            journal.step_begins(step, training)
            due = [recorder for recorder in self._recorders if due_at(recorder.probe)(step)]
            self.checked = step
        finally:
            journal.clock.since(begun)
        return due
