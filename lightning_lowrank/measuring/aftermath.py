"""The slowdown of the training's own work after a sample, until caches, memory and loggers are through with it."""

import sys
from collections import deque
from collections.abc import Sequence
from itertools import islice, pairwise
from statistics import fmean, median
from typing import NamedTuple

# Steps, that of the sample among them, which may be slower for it; samples that are kept. Few are no measure.
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

    Each sample is compared as a whole, since a thread that writes its numbers delays one step or another. The median
    over samples is told, so that a step that is slow for another reason does not count. The first sample of a process
    is no measure. At a step next to nothing is done: all is worked out at the next sample.

    Attributes:
        seconds: How much longer the steps after samples took; 0 where samples are too near to each other.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._more = deque[float](maxlen=KEPT)
        self._num_samples = 0
        # Since the last sample, its own step included: the first ones, the latest ones, and how many there were.
        self._first: list[Begin] = []
        self._latest = deque[Begin](maxlen=NEAR + 1)
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
            self._compare()
            self._first = [self._latest[-1]]
            self._num_steps = 0
        begin = Begin(now, ours, measures)
        self._latest.append(begin)
        self._num_steps += 1
        if len(self._first) <= NEAR:
            self._first.append(begin)

    def rests(self) -> None:
        """A step begins that is not looked at: from here to the next sample nothing is a measure."""
        self._num_steps = -sys.maxsize

    def _compare(self) -> None:
        """Another sample: at most the first half of the steps since the last one were near it."""
        self._num_samples += 1
        if self._num_samples <= 2 or self._num_steps < BETWEEN:
            return
        number = min(NEAR, self._num_steps // 2)
        near = _steps(self._first[: number + 1])
        far = _steps([*islice(self._latest, len(self._latest) - number - 1, None)])
        if near and far:
            self._more.append(number * (fmean(near) - fmean(far)))
        if len(self._more) >= FEW:
            # Of all samples, as if those that were no measure had cost as much.
            self.seconds = max(0.0, self._num_samples * median(self._more))


def _steps(begins: Sequence[Begin]) -> list[float]:
    """How long each took without what is ours; nothing of those in which something else was."""
    return [b.now - a.now - (b.ours - a.ours) for a, b in pairwise(begins) if b.measures]
