"""Training time, and what we add to it."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from lightning_lowrank.measuring.aftermath import Aftermath


def cuda_event() -> Any:
    """An event that measures time on the current stream."""
    return torch.cuda.Event(enable_timing=True)


class Clock:
    """Seconds spent in training, without validation, and those of them that were ours.

    Ours are seconds of the host; on CUDA those between two events of the device, so that what the training step had
    queued before is not ours. They count once the device is past them: nothing waits. Where ours is a collective,
    waiting for other processes is part of it. On CPU the steps after a sample are slower, as caches fill again: how
    much, the clock tells by comparison with steps far from samples, and that is ours too. Two monitors that sample at
    the same steps both count it.

    Args:
        now: Seconds of the host.
        event: Makes what is recorded on a device.
    """

    # Seconds that were any monitor's of this process.
    _everyones: ClassVar[float] = 0.0

    def __init__(self, now: Callable[[], float] = time.perf_counter, event: Callable[[], Any] = cuda_event) -> None:
        self.now, self._event = now, event
        self._on_device = False
        self._own = self._sample = self._before = 0.0
        self._begun: float | None = None
        self._sampled = self._whole = False
        self._aftermath = Aftermath()
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
        self._whole, self._aftermath = False, Aftermath()
        self._begun = self.now()

    def pause(self) -> None:
        """Training is interrupted."""
        if self._begun is not None:
            self._before, self._begun = self.total, None
        self.interrupt()

    def resume(self) -> None:
        """Training goes on."""
        if self._begun is None:
            self._begun = self.now()

    def samples(self) -> None:
        """There is a sample in this step."""
        self._sampled = True

    def step_begins(self) -> None:
        """A step begins."""
        sampled, self._sampled = self._sampled, False
        whole, self._whole = self._whole, True
        if not self._on_device:
            self._aftermath.step_begins(self.now(), Clock._everyones, measures=whole, sampled=sampled)

    def interrupt(self) -> None:
        """The step has more in it than a step, such as the end of an epoch: it is no measure."""
        self._whole = False

    @property
    def total(self) -> float:
        """Seconds in training so far."""
        return self._before + (self.now() - self._begun if self._begun is not None else 0.0)

    @property
    def own(self) -> float:
        """Our seconds in training so far, and what samples have cost the steps beside them."""
        self._settle()
        return self._own + self._aftermath.seconds

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

    def since(self, begun: float) -> None:
        """Count what has passed on the host as ours: work at every step that takes no longer than `timed` would."""
        if not self._on_device:
            self._add(self.now() - begun, self._begun is not None)

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
            return self.now()
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
        Clock._everyones += seconds
        if training:
            self._own += seconds
