"""The slowdown of the training's own work after a sample, until caches and memory have recovered."""

from collections import deque
from statistics import median

# Steps, that of the sample among them, which may be slower for it; of steps at each place, and of those far from
# samples, so many of the latest are kept. Few are no measure.
NEAR, KEPT, FEW = 16, 64, 3
# With fewer steps between samples all are near one.
BETWEEN = 8


class Aftermath:
    """Steps of the training without what is ours in them: those soon after a sample against the last ones before the
    next.

    Medians, so that a step that is slow for another reason does not count. The first sample of a process is no measure.

    Attributes:
        seconds: How much longer the steps after samples took; 0 where samples are too near to each other.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._near = [deque[float](maxlen=KEPT) for _ in range(NEAR)]
        self._counts = [0] * NEAR
        self._far = deque[float](maxlen=KEPT)
        # Steps since the last sample; None before the second.
        self._since: list[float | None] | None = None
        self._num_samples = 0

    def lap(self, seconds: float | None, *, sampled: bool) -> None:
        """A step is over.

        Args:
            seconds: How long it took; None where something else was in it.
            sampled: Whether a sample was.
        """
        if sampled:
            self._sort()
            self._num_samples += 1
            self._since = [] if self._num_samples > 1 else None
        if self._since is not None:
            self._since.append(seconds)

    def _sort(self) -> None:
        """Another sample: the first half of the steps since the last one were near it, the others far from both."""
        if self._since is None or len(self._since) < BETWEEN:
            return
        half = len(self._since) // 2
        for place, step in enumerate(self._since[: min(half, NEAR)]):
            if step is not None:
                self._near[place].append(step)
                self._counts[place] += 1
        self._far.extend(step for step in self._since[half:] if step is not None)
        self.seconds = self._more()

    def _more(self) -> float:
        if min(len(self._far), self._counts[0]) < FEW:
            return 0.0
        usual = median(self._far)
        more = (n * (median(of) - usual) for n, of in zip(self._counts, self._near, strict=True) if of)
        return max(0.0, sum(more))
