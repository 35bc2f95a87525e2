"""A long run holds no more memory, no more hooks and no more bytes a sample than a short one."""

import gc
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.load import Layers, Trained, rows
from benchmarks.soak import SOURCES, Reading, curvature, growth, soaked
from lightning_lowrank import RankMonitor
from tests.processes import together
from tests.trainings import Classifier, MemoryLogger

# Steps of the training; the long one is that of the evidence page.
LENGTHS = [pytest.param(400, marks=pytest.mark.slow), pytest.param(1500, marks=pytest.mark.evidence)]


@pytest.fixture(scope="module", params=LENGTHS)
def readings(request: pytest.FixtureRequest) -> list[Reading]:
    """A sample every five steps, in a process of its own."""
    return soaked(5, steps=request.param)


def test_hooks_stay_as_many_as_they_were(readings: list[Reading]) -> None:
    assert [reading.hooks for reading in readings] == [0] * 10


def test_memory_stays_what_it_is_after_the_warm_up(readings: list[Reading]) -> None:
    assert growth(readings) <= 2


def test_the_event_file_grows_along_a_line(readings: list[Reading]) -> None:
    assert readings[-1].written > 80 * 1000
    assert curvature(readings) < 1


class Collected(L.Callback):
    """Tensors that only the garbage collector would have freed, from the third step to the end."""

    def __init__(self) -> None:
        self.tensors: list[torch.Size] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            gc.collect()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        self.tensors = [thing.shape for thing in gc.garbage if isinstance(thing, torch.Tensor)]
        gc.garbage.clear()


def collected(rank: int, size: int, root: Path) -> list[torch.Size]:
    """Tensors that a watched training leaves to the collector."""
    gc.disable()
    found = Collected()
    settings = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    L.Trainer(**settings, max_epochs=1, callbacks=[RankMonitor(SOURCES, every_n_steps=1, detail="all"), found]).fit(
        Classifier()
    )
    return found.tensors


@pytest.mark.slow
def test_a_sample_leaves_no_tensor_to_the_garbage_collector(tmp_path: Path) -> None:
    """Which is in no hurry, and knows nothing of the memory of devices. In a process of its own: what other tests have
    left may become garbage at any time.
    """
    assert together(collected, tmp_path, size=1) == [[]]


@pytest.mark.slow
def test_a_thousand_layers_are_watched_without_a_failure() -> None:
    monitor, logger = RankMonitor(("gradients", "updates", "features"), every_n_steps=1, detail="all"), MemoryLogger()
    settings = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    batches = DataLoader(TensorDataset(rows()), 8)

    L.Trainer(**settings, max_steps=1, logger=logger, callbacks=[monitor]).fit(Trained(Layers(1000, 32)), batches)

    assert monitor.failures == 0
    assert monitor.latest is not None
    for row in monitor.latest.values.values():
        assert len(row) == 1000
        assert np.isfinite(list(row.values())).all()
    # Far too many for curves of their own.
    assert not any("layers" in tag for tag in logger.curves())
