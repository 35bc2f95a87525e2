"""The slowdown of the training's own work after a sample, until caches and memory have recovered."""

from collections import deque
from collections.abc import Sequence
from itertools import islice, pairwise
from statistics import median
from typing import NamedTuple

# Steps, that of the sample among them, which may be slower for it; of steps at each place, and of those far from
# samples, so many of the latest are kept. Few are no measure.
NEAR, KEPT, FEW = 16, 64, 3
# With fewer steps between samples all are near one.
BETWEEN = 8


class Begin(NamedTuple):
    """A step begins.

    Attributes:
        now: Seconds of the host.
        ours: Seconds that any monitor has taken so far.
        measures: There was nothing but a step since the last one began.
    """

    now: float
    ours: float
    measures: bool


class Aftermath:
    """Steps of the training without what is ours in them: those soon after a sample against the last ones before the
    next.

    Medians, so that a step that is slow for another reason does not count. The first sample of a process is no measure.
    At a step next to nothing is done: all is worked out at the next sample.

    Attributes:
        seconds: How much longer the steps after samples took; 0 where samples are too near to each other.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._near = [deque[float](maxlen=KEPT) for _ in range(NEAR)]
        self._far = deque[float](maxlen=KEPT)
        self._num_samples = 0
        # Since the last sample, its own step included: the first ones, the latest ones, and how many there were.
        self._first: list[Begin] = []
        self._latest = deque[Begin](maxlen=KEPT + 1)
        self._num_steps = -1

    def step_begins(self, now: float, ours: float, *, measures: bool, sampled: bool) -> None:
        """A step begins.

        Args:
            now: Seconds of the host.
            ours: Seconds that any monitor has taken so far.
            measures: There was nothing but a step since the last one began.
            sampled: There was a sample in that.
        """
        if sampled and self._latest:
            self._sort()
            self._first = [self._latest[-1]]
            self._num_steps = 0
        begin = Begin(now, ours, measures)
        self._latest.append(begin)
        self._num_steps += 1
        if len(self._first) <= NEAR:
            self._first.append(begin)

    def _sort(self) -> None:
        """Another sample: the first half of the steps since the last one were near it, the others far from both."""
        self._num_samples += 1
        half = self._num_steps // 2
        if self._num_samples <= 2 or self._num_steps < BETWEEN:
            return
        for place, step in enumerate(_steps(self._first[: half + 1])):
            if step is not None:
                self._near[place].append(step)
        far = min(self._num_steps - half, KEPT)
        latest = islice(self._latest, len(self._latest) - far - 1, None)
        self._far.extend(step for step in _steps([*latest]) if step is not None)
        self.seconds = self._more()

    def _more(self) -> float:
        """Of all samples, as if those that were no measure had cost as much."""
        if min(len(self._far), len(self._near[0])) < FEW:
            return 0.0
        usual = median(self._far)
        return max(0.0, self._num_samples * sum(median(of) - usual for of in self._near if of))


def _steps(begins: Sequence[Begin]) -> list[float | None]:
    """How long each took without what is ours; None where something else was in it."""
    return [b.now - a.now - (b.ours - a.ours) if b.measures else None for a, b in pairwise(begins)]
