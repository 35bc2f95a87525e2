"""A training run that is killed again and again with SIGKILL, and resumed from its last whole checkpoint each time.

Twenty kills, with the figures that the documentation states:

    python -m tests.killed_runs --kills 20
"""

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_lowrank import RankMonitor
from tests.processes import forked
from tests.trainings import Classifier, digits

SOURCES = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features")
STATISTICS = ("stable_rank", "effective_rank", "subspace_overlap")
EVERY, SAVE, STEPS_PER_KILL = 3, 7, 20

# At which a process kills itself. Those of checkpoints come at the first one from the chosen step on.
MOMENTS = (
    "batch begins",
    "loss is live",
    "gradients are final",
    "optimizer has stepped",
    "half of a report is written",
    "batch is over",
    "checkpoint begins",
    "checkpoint is half written",
    "last checkpoint is half written",
    "checkpoint is written",
)
OUTSIDE = "any, from outside"


@dataclass(frozen=True)
class Kill:
    """When a process dies.

    Attributes:
        step: Optimizer steps taken before.
        moment: One of `MOMENTS`, or `OUTSIDE`.
        delay: Seconds after the start of the process, from outside.
    """

    step: int
    moment: str
    delay: float = 0.0


@dataclass(frozen=True)
class Life:
    """One process of a run.

    Attributes:
        resumed: Optimizer steps in the checkpoint that it began with.
        exit_code: As `multiprocessing` has it: minus the signal.
        curves: What it wrote, as TensorBoard reads it: tag -> (step, value).
    """

    resumed: int
    exit_code: int
    curves: Mapping[str, Sequence[tuple[int, float]]]


class Killer(L.Callback):
    """Kills its own process at a moment of a step."""

    def __init__(self, kill: Kill | None, *, watched: bool) -> None:
        self.kill, self.watched, self.step = kill, watched, -1

    def at(self, moment: str) -> bool:
        """Whether this is the moment."""
        return self.kill is not None and self.kill.moment == moment and self.step >= self.kill.step

    def maybe(self, moment: str) -> None:
        """Die if this is the moment."""
        if self.at(moment):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.maybe("optimizer has stepped"))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.step = trainer.global_step
        self.maybe("batch begins")

    def on_before_backward(self, *_: Any) -> None:
        self.maybe("loss is live")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.maybe("gradients are final")

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.watched and self.step % EVERY == 0:  # where a monitor would report
            self.maybe("half of a report is written")
        self.maybe("batch is over")


class Writer(TensorBoardLogger):
    """May die in the middle of a report."""

    def __init__(self, root: Path, killer: Killer) -> None:
        super().__init__(root, name="", version="")
        self.killer = killer

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if any("lowrank/" in tag for tag in metrics) and self.killer.at("half of a report is written"):
            super().log_metrics(dict(list(metrics.items())[: len(metrics) // 2]), step)
            self.killer.maybe("half of a report is written")
        super().log_metrics(metrics, step)


class Disk(TorchCheckpointIO):
    """May die while it writes a checkpoint and leave half of it, as a file system without atomic renames does."""

    def __init__(self, killer: Killer) -> None:
        super().__init__()
        self.killer = killer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.killer.maybe("checkpoint begins")
        super().save_checkpoint(checkpoint, path, storage_options)
        moment = "last checkpoint is half written" if "last" in Path(path).name else "checkpoint is half written"
        if self.killer.at(moment):
            os.truncate(path, os.path.getsize(path) // 2)
            self.killer.maybe(moment)
        self.killer.maybe("checkpoint is written")


class Learner(Classifier):
    """Sixteen shuffled batches an epoch, and dropout."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(256), batch_size=16, shuffle=True)


def newest(folder: Path) -> tuple[Path | None, int]:
    """The checkpoint of the most steps that is whole, and its steps."""
    found: list[tuple[int, Path]] = []
    for path in sorted(folder.glob("*.ckpt")):
        with suppress(Exception):  # half written
            found.append((torch.load(path, weights_only=True)["global_step"], path))
    steps, path = max(found, default=(0, None), key=lambda pair: pair[0])
    return path, steps


def live(root: Path, kill: Kill | None, num_steps: int, watched: bool) -> None:
    """Train until death or the end, from the last whole checkpoint on."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Lightning's, of a resumed epoch
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    checkpoint, steps = newest(root)
    L.seed_everything(steps, verbose=False)
    killer, module = Killer(kill, watched=watched), Learner()
    saver = ModelCheckpoint(root, every_n_train_steps=SAVE, save_last=True)
    monitors = [RankMonitor(SOURCES, STATISTICS, every_n_steps=EVERY, per_site=True, detail="all")] if watched else []
    options = {
        "max_steps": num_steps,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": [Disk(killer)],
    }
    trainer = L.Trainer(**options, logger=Writer(root, killer), callbacks=[*monitors, killer, saver])
    trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    torch.save({"module": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}, root / "end.pt")


def lives(root: Path, kills: Sequence[Kill], num_steps: int, *, watched: bool) -> list[Life]:
    """Run to the end, with a process for each kill and one more."""
    root.mkdir()
    return [_one(root, kill, num_steps, watched) for kill in [*kills, None]]


def _one(root: Path, kill: Kill | None, num_steps: int, watched: bool) -> Life:
    before, (_, resumed) = set(root.glob("events*")), newest(root)
    process = forked().Process(target=live, args=(root, kill, num_steps, watched))
    process.start()
    if kill is not None and kill.moment == OUTSIDE:
        time.sleep(kill.delay)
        process.kill()
    process.join(120)
    assert process.exitcode is not None, f"{kill} hangs"
    files = set(root.glob("events*")) - before
    return Life(resumed, process.exitcode, curves(files.pop()) if files else {})


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars of an event file or a directory of them."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def drawn(num_kills: int, seed: int) -> list[Kill]:
    """Random kills, a fifth of them from outside, at steps that go up."""
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(num_kills * STEPS_PER_KILL), num_kills))
    order = draw.sample(MOMENTS, len(MOMENTS))
    moments = [OUTSIDE] * (num_kills // 5) + [order[i % len(order)] for i in range(num_kills - num_kills // 5)]
    draw.shuffle(moments)
    return [Kill(step, moment, draw.uniform(0, 1.5)) for step, moment in zip(steps, moments, strict=True)]


def repeatable(kills: Sequence[Kill], lived: Sequence[Life]) -> list[Kill]:
    """The same kills for another run: one from outside counts as one right after the last checkpoint it left."""
    return [
        Kill(after.resumed, "batch begins") if kill.moment == OUTSIDE else kill
        for kill, after in zip(kills, lived[1:], strict=True)
    ]


@dataclass(frozen=True)
class Evidence:
    """What came of a run that was killed, and of the same without a monitor.

    Attributes:
        lived: The processes of the watched run.
        unwatched: Those of the other.
        points: Those at steps before the checkpoint with which the next process began, over all curves.
        lost: Due steps before that checkpoint at which a curve has no point.
        doubled: Points before it that are there twice, or where none is due.
        failures: Numbers that a process could not have.
        same: Whether weights and optimizer state at the end are equal bit for bit.
    """

    lived: Sequence[Life]
    unwatched: Sequence[Life]
    points: int
    lost: int
    doubled: int
    failures: float
    same: bool


def evidence(root: Path, kills: Sequence[Kill]) -> Evidence:
    """Kill a run with and one without a monitor in the same places."""
    num_steps = STEPS_PER_KILL * len(kills)
    lived = lives(root / "watched", kills, num_steps, watched=True)
    unwatched = lives(root / "unwatched", repeatable(kills, lived), num_steps, watched=False)
    points = lost = doubled = 0
    tags = {tag for life in lived for tag in life.curves} - {"loss", "epoch"}
    for life, end in zip(lived, [*(after.resumed for after in lived[1:]), num_steps], strict=True):
        due = {step for step in range(life.resumed, end) if step % EVERY == 0}
        for tag in tags:
            kept = [step for step, _ in life.curves.get(tag, []) if step < end]
            points += len(kept)
            lost += len(due.difference(kept))
            doubled += len(kept) - len(due.intersection(kept))
    failures = max(value for life in lived for _, value in life.curves.get("lowrank/rank_failures", []))
    same = _equal(*(root / name / "end.pt" for name in ("watched", "unwatched")))
    return Evidence(lived, unwatched, points, lost, doubled, failures, same)


def _equal(*paths: Path) -> bool:
    with suppress(AssertionError):
        torch.testing.assert_close(*(torch.load(path, weights_only=True) for path in paths), rtol=0, atol=0)
        return True
    return False


def main() -> None:
    """Print what came of some kills."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in {"--kills": 20, "--seed": 0}.items():
        parser.add_argument(option, type=int, default=default)
    options = parser.parse_args()
    kills = drawn(options.kills, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        found = evidence(Path(folder), kills)
    for kill, life, after in zip(kills, found.lived[:-1], found.lived[1:], strict=True):
        sys.stdout.write(
            f"from step {life.resumed:4}, killed: {kill.moment} (from step {kill.step}), resumed at {after.resumed}\n"
        )
    for run in (found.lived, found.unwatched):
        sys.stdout.write(f"exit codes {[life.exit_code for life in run]}\n")
    sys.stdout.write(
        f"{found.points} points, {found.lost} lost, {found.doubled} doubled, {found.failures:.0f} failures\n"
    )
    sys.stdout.write(f"weights and optimizer state {'equal' if found.same else 'DIFFERENT'}\n")


if __name__ == "__main__":
    main()
