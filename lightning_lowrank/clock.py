"""Training time and our share of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Host seconds spent in training, without validation, and those of them that were ours.

    On CUDA the host waits for the device only when a report is moved; the share then also counts what the training step had queued before.
    """

    def __init__(self) -> None:
        self.own = 0.0
        self.sample = 0.0
        self._begun: float | None = None
        self._before = 0.0
        self._depth = 0

    def start(self) -> None:
        """Begin anew."""
        self.own = self.sample = self._before = 0.0
        self._begun = time.perf_counter()

    def pause(self) -> None:
        """Training is interrupted."""
        if self._begun is not None:
            self._before, self._begun = self.total, None

    def resume(self) -> None:
        """Training goes on."""
        if self._begun is None:
            self._begun = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds in training so far."""
        return self._before + (time.perf_counter() - self._begun if self._begun is not None else 0.0)

    @property
    def percent(self) -> float:
        """Our share of it; 0 before training."""
        return 100 * self.own / self.total if self.total else 0.0

    def take_sample(self) -> float:
        """Our seconds since this was last asked."""
        spent, self.sample = self.sample, 0.0
        return spent

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Count what happens inside as ours, once where it is nested."""
        begun = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                spent = time.perf_counter() - begun
                self.own += spent
                self.sample += spent
