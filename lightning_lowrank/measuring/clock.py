"""Training time, and what we add to it."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def cuda_event() -> Any:
    """What tells the time on the current stream."""
    return torch.cuda.Event(enable_timing=True)


class Clock:
    """Seconds spent in training, without validation, and those of them that were ours.

    Ours are seconds of the host; on CUDA those between two events of the device, so that what the training step had
    queued before is not ours. They count once the device is past them: nothing waits. Where ours is a collective,
    waiting for other processes is part of it.

    Args:
        now: Seconds of the host.
        event: Makes what is recorded on a device.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, event: Callable[[], Any] = cuda_event) -> None:
        self._now, self._event = now, event
        self._on_device = False
        self._own = self._sample = self._before = 0.0
        self._begun: float | None = None
        self._inside = False
        self._entered: Any = None
        # Pairs of events that the device may not be past yet, and whether they are in training.
        self._passing: deque[tuple[Any, Any, bool]] = deque()

    def start(self, *, on_device: bool = False) -> None:
        """Begin anew.

        Args:
            on_device: Events tell our time.
        """
        self._on_device = on_device
        self._own = self._sample = self._before = 0.0
        self._passing.clear()
        self._begun = self._now()

    def pause(self) -> None:
        """Training is interrupted."""
        if self._begun is not None:
            self._before, self._begun = self.total, None

    def resume(self) -> None:
        """Training goes on."""
        if self._begun is None:
            self._begun = self._now()

    @property
    def total(self) -> float:
        """Seconds in training so far."""
        return self._before + (self._now() - self._begun if self._begun is not None else 0.0)

    @property
    def own(self) -> float:
        """Our seconds in training so far."""
        self._settle()
        return self._own

    @property
    def percent(self) -> float:
        """How much longer training takes by us: our seconds over those that it would have taken without; 0 before."""
        own = self.own
        return 100 * own / (self.total - own) if self.total > own else 0.0

    def take_sample(self) -> float:
        """Our seconds since this was last asked, in validation too."""
        self._settle()
        spent, self._sample = self._sample, 0.0
        return spent

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what happens inside as ours, once where it is nested."""
        if self._inside:
            yield
            return
        self._entered, self._inside = self._read(), True
        try:
            yield
        finally:
            self._pass()
            self._inside = False

    def _pass(self) -> None:
        """Count what has passed inside so far: a report is written from within, and is to hold what it cost."""
        begun, self._entered = self._entered, self._read()
        training = self._begun is not None
        if self._on_device:
            self._passing.append((begun, self._entered, training))
        else:
            self._add(self._entered - begun, training)

    def _read(self) -> Any:
        """Seconds, or an event from which they will be known."""
        if not self._on_device:
            return self._now()
        event = self._event()
        event.record()
        return event

    def _settle(self) -> None:
        """Count what the device is past."""
        if self._inside:
            self._pass()
        while self._passing and self._passing[0][1].query():
            begun, ended, training = self._passing.popleft()
            self._add(begun.elapsed_time(ended) / 1000, training)

    def _add(self, seconds: float, training: bool) -> None:
        self._sample += seconds
        if training:
            self._own += seconds
