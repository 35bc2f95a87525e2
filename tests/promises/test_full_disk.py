"""Training goes on when the disk is full: real runs in processes of their own, in which no file may grow while it
lasts.
"""

import csv
import os
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_lowrank import RankMonitor
from tests.killed_runs import curves
from tests.processes import forked
from tests.trainings import Classifier

pytestmark = pytest.mark.slow

LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": lambda root: TensorBoardLogger(root, name="", version=""),
    "csv": lambda root: CSVLogger(root, name="", version=""),
}
MEDIAN = "rank/gradient_stable_rank_median"


class Silent(Classifier):
    """Logs nothing of its own, which Lightning would end the run for."""

    def log(self, *_: Any, **__: Any) -> None:
        """Nothing."""


class Disk(L.Callback):
    """Is full from one step to another, and a checkpoint is saved after that; every write then fails with `OSError`."""

    def __init__(self, root: Path, full: range) -> None:
        self.root, self.full = root, full

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        room(0 if trainer.global_step in self.full else None)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.full.stop + 1:
            trainer.save_checkpoint(self.root / "after.ckpt")


def room(num_bytes: int | None) -> None:
    """How large a file may grow in this process, None for what was allowed at first."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if num_bytes is None else num_bytes, hard))


def train(root: Path, kind: str, full: range, watched: bool, module: type[Classifier]) -> None:
    """Sixteen steps; leaves behind how they ended."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - tracebacks of TensorBoard's thread
    L.seed_everything(3, verbose=False)
    learner, monitors = module(), [RankMonitor(every_n_steps=3, detail="all")] if watched else []
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        **quiet, max_epochs=2, log_every_n_steps=1, logger=LOGGERS[kind](root), callbacks=[Disk(root, full), *monitors]
    )
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(learner)
        except OSError:
            error = f"full disk at step {trainer.global_step}"
    room(None)
    said = [str(w.message) for w in caught if "lightning_lowrank" in str(w.message)]
    failures = sum(monitor.failures for monitor in monitors)
    torch.save({"weights": learner.state_dict(), "error": error, "failures": failures, "said": said}, root / "end.pt")


def ended(root: Path, *arguments: Any) -> dict[str, Any]:
    """How the run of a process ended."""
    root.mkdir()
    process = forked().Process(target=train, args=(root, *arguments))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return torch.load(root / "end.pt", weights_only=True)


def steps(root: Path, kind: str) -> list[int]:
    """Those of one curve."""
    if kind == "tensorboard":
        return [step for step, _ in curves(root)[MEDIAN]]
    rows = csv.DictReader((root / "metrics.csv").read_text().splitlines())
    return [int(row["step"]) for row in rows if row[MEDIAN]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An unwatched run that logs nothing, to which the disk is all the same."""
    return ended(tmp_path_factory.mktemp("alone") / "run", "csv", range(0), False, Silent)


@pytest.mark.parametrize("kind", LOGGERS)
def test_a_full_disk_costs_points_a_count_and_one_warning(kind: str, alone: dict[str, Any], tmp_path: Path) -> None:
    found = ended(tmp_path / "run", kind, range(5, 100), True, Silent)

    torch.testing.assert_close(found["weights"], alone["weights"], rtol=0, atol=0)
    assert steps(tmp_path / "run", kind) == [0, 3]
    assert found["failures"] == 4  # steps 6, 9, 12 and 15
    assert len(found["said"]) == 1 and "a logger raised OSError: [Errno 27] File too large" in found["said"][0]
    assert found["error"] == alone["error"] == ""


@pytest.mark.parametrize("kind", LOGGERS)
def test_curves_go_on_when_there_is_room_again(kind: str, alone: dict[str, Any], tmp_path: Path) -> None:
    found = ended(tmp_path / "run", kind, range(5, 10), True, Silent)

    torch.testing.assert_close(found["weights"], alone["weights"], rtol=0, atol=0)
    assert steps(tmp_path / "run", kind) == [0, 3, 12, 15]
    assert found["failures"] == 2  # steps 6 and 9
    assert found["error"] == alone["error"] == ""


def test_where_lightnings_own_logging_ends_the_run_it_ends_at_the_same_step(tmp_path: Path) -> None:
    watched, unwatched = (
        ended(tmp_path / str(watched), "tensorboard", range(5, 100), watched, Classifier) for watched in (True, False)
    )

    assert watched["error"] == unwatched["error"] == "full disk at step 6"
