"""A long training with a monitor: resident memory, hooks and the event file as the steps go by, beside the same
training without.

    python -m benchmarks.soak --steps 10000 --every 10

Memory that grows in both is that of Lightning and TensorBoard; what the monitor adds is the difference of the two.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.overhead import quiet
from lightning_lowrank import RankMonitor

SOURCES = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
MEBIBYTE = 2**20


class Digits(L.LightningModule):
    """A small MLP on scikit-learn's handwritten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return DataLoader(
            TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)), 32, shuffle=True
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


@dataclass(frozen=True)
class Reading:
    """What there is after so many steps.

    Attributes:
        step: Steps taken.
        memory: MiB that the process holds.
        hooks: On modules, their parameters and optimizers.
        written: Bytes of event files, flushed.
    """

    step: int
    memory: float
    hooks: int
    written: int


class MemoryGauge(L.Callback):
    """Takes a reading every so many steps."""

    def __init__(self, every: int, folder: Path) -> None:
        self.every, self.folder = every, folder
        self.readings: list[Reading] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read, if it is time."""
        if trainer.global_step % self.every == 0:
            for logger in trainer.loggers:
                logger.save()
            written = sum(file.stat().st_size for file in self.folder.rglob("events*"))
            self.readings.append(
                Reading(trainer.global_step, resident(), num_hooks(pl_module, trainer.optimizers), written)
            )


def resident() -> float:
    """MiB that this process holds now; Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE


def num_hooks(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Hooks of all layers, parameters and optimizers."""
    of_layers = sum(len(getattr(layer, kind)) for layer in module.modules() for kind in HOOKS)
    of_parameters = sum(
        len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in module.parameters()
    )
    return (
        of_layers
        + of_parameters
        + sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers)
    )


def soaked(every: int | None, *, steps: int, num_readings: int = 10, histograms: bool = False) -> list[Reading]:
    """Readings of one training, in a process of its own, watched every so many steps or not at all."""
    run = partial(_soak, every, steps=steps, num_readings=num_readings, histograms=histograms)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        return pool.submit(run).result()


def _soak(every: int | None, *, steps: int, num_readings: int, histograms: bool) -> list[Reading]:
    quiet()
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        gauge = MemoryGauge(steps // num_readings, Path(folder))
        monitors = (
            [] if every is None else [RankMonitor(SOURCES, every_n_steps=every, histograms=histograms, per_site=True)]
        )
        quietly: dict[str, Any] = {
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
        }
        # The gauge last: it reads when the monitor is through.
        L.Trainer(max_steps=steps, callbacks=[*monitors, gauge], logger=TensorBoardLogger(folder), **quietly).fit(
            Digits()
        )
        return gauge.readings


def growth(readings: Sequence[Reading]) -> float:
    """MiB from the end of the warm-up, a fifth of the run, to the end."""
    return readings[-1].memory - readings[len(readings) // 5 - 1].memory


def curvature(readings: Sequence[Reading]) -> float:
    """How far the event file is from a line through its sizes, in percent of the last."""
    steps, sizes = np.array([(r.step, r.written) for r in readings], dtype=float).T
    line = np.polyval(np.polyfit(steps, sizes, 1), steps)
    return float(100 * np.abs(sizes - line).max() / sizes[-1])


def main(steps: int = 10_000, every: int = 10, histograms: bool = False) -> None:
    """Print the table.

    Args:
        steps: Of the training.
        every: Cadence of the monitor.
        histograms: Also write the spectra.
    """
    run: Callable[[int | None], list[Reading]] = partial(soaked, steps=steps, histograms=histograms)
    alone, watched = run(None), run(every)
    table = Table(title=f"{steps:,} steps, a sample of {', '.join(SOURCES)} every {every}")
    for heading in ("step", "MiB without", "MiB watched", "MiB more", "hooks", "event file, KiB"):
        table.add_column(heading, justify="right")
    for plain, ours in zip(alone, watched, strict=True):
        memory = (f"{value:.2f}" for value in (plain.memory, ours.memory, ours.memory - plain.memory))
        table.add_row(f"{ours.step:,}", *memory, str(ours.hooks), f"{ours.written / 1024:,.0f}")
    console = Console(width=110)
    console.print(table)
    console.print(
        f"growth of memory after {watched[len(watched) // 5 - 1].step:,} steps, MiB: {growth(alone):.2f} without",
        end=", ",
    )
    console.print(f"{growth(watched):.2f} watched; limit 2")
    num_samples = (watched[-1].step - watched[0].step) / every
    each = (watched[-1].written - watched[0].written) / num_samples
    console.print(f"event file: {each:,.0f} bytes a sample, at most {curvature(watched):.2f} % off a line")


if __name__ == "__main__":
    auto_cli(main)
