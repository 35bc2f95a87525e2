"""Actions of alerts: messages, files, calls of users' functions, checkpoints, the end of training."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.alerts.messages import table
from lightning_lowrank.reports.alerts.rules import AlertEvent
from lightning_lowrank.reports.loggers import each, each_writer

WANDB_LEVELS = {"info": "INFO", "warn": "WARN", "error": "ERROR"}


@dataclass
class UserCall:
    """A user's function at work in a thread of its own."""

    function: Callable[[AlertEvent], Any]
    event: AlertEvent
    timeout: float
    begun: float = field(default_factory=time.monotonic)
    error: str = ""

    def __post_init__(self) -> None:
        # A daemon: a function that hangs must not keep Python from ending.
        self.thread = threading.Thread(target=self._run, name="lightning_lowrank alert", daemon=True)
        self.thread.start()

    @property
    def is_late(self) -> bool:
        """Whether it has had its time."""
        return self.thread.is_alive() and time.monotonic() - self.begun >= self.timeout

    def wait(self) -> None:
        """Until it is through, or has had its time."""
        self.thread.join(max(0.0, self.begun + self.timeout - time.monotonic()))

    def _run(self) -> None:
        try:
            self.function(self.event)
        except BaseException as error:  # SystemExit too: it is theirs, and may not harm
            self.error = f"{type(error).__name__}: {error}"


class Calls:
    """Runs users' functions off the training thread; reports what they raise later, and calls none again that hangs."""

    def __init__(self) -> None:
        self._running: list[UserCall] = []
        self._given_up: list[Callable[[AlertEvent], Any]] = []

    def __bool__(self) -> bool:
        """Whether one is at work."""
        return bool(self._running)

    def begin(self, function: Callable[[AlertEvent], Any], event: AlertEvent, timeout: float) -> None:
        """Call a function, unless it has hung before."""
        if function not in self._given_up:
            self._running.append(UserCall(function, event, timeout))

    def troubles(self) -> list[str]:
        """Failures since the last query."""
        late = [call for call in self._running if call.is_late]
        through = [call for call in self._running if not call.thread.is_alive()]
        self._given_up += [call.function for call in late]
        self._running = [call for call in self._running if call not in late and call not in through]
        raised = [f"a function called by an alert raised {call.error}" for call in through if call.error]
        return raised + [
            f"a function called by an alert took more than {call.timeout:g} s and is not called again" for call in late
        ]

    def wait(self) -> list[str]:
        """Let those at work have their time: the process may end after this. What went wrong."""
        for call in self._running:
            call.wait()
        return self.troubles()


def warn(label: str, event: AlertEvent) -> None:
    """On the console of the first process: a warning, or a line if it is over or mere information."""
    if event.state == "firing" and event.severity != "info":
        rank_zero_warn(f"lightning_lowrank {label} alert: {event.message}")
    else:
        rank_zero_info(f"lightning_lowrank {label} alert: {event.message}")


def write(training: Training, label: str, events: Sequence[AlertEvent], step: int) -> list[Exception]:
    """All events so far: a table in TensorBoard, and a file of JSON lines beside the logs."""
    loggers = training.loggers
    tag, text = f"lowrank/{label}_alerts", table(events)
    failed = each_writer(loggers, "add_text", lambda writer: writer.add_text(tag, text, step))
    return failed + each(loggers[:1], lambda logger: _write_lines(logger, label, events))


def alert_wandb(training: Training, event: AlertEvent) -> list[Exception]:
    """Its own alert, by duck-typing, where there is its logger; it is sent in the background."""
    level = "INFO" if event.state == "resolved" else WANDB_LEVELS[event.severity]
    options = {"title": event.title, "text": event.message, "level": level, "wait_duration": 0}
    return each_writer(training.loggers, "alert", lambda run: run.alert(**options))


def save_checkpoint(training: Training, event: AlertEvent) -> None:
    """Beside the logs; called by all processes."""
    training.save_checkpoint(f"{Path(training.folder) / 'checkpoints'}/alert-{event.rule}-step={event.step}.ckpt")


def stop(training: Training) -> None:
    """End training after this batch; called by all processes, so that all end at the same one."""
    rank_zero_info("lightning_lowrank: an alert stops the training after this batch")
    training.stop()


def json_lines(events: Iterable[AlertEvent]) -> str:
    """One event a line, null where there is no number."""
    return "".join(json.dumps(_finite(asdict(event))) + "\n" for event in events)


def _write_lines(logger: Any, label: str, events: Sequence[AlertEvent]) -> None:
    folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    if folder:
        # Whole each time: a run that is resumed may have another folder, and not every store can append.
        files = get_filesystem(folder)
        files.makedirs(folder, exist_ok=True)
        with files.open(f"{folder}/lowrank_alerts_{label}.jsonl", "w") as file:
            file.write(json_lines(events))


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and value - value != 0 else value
