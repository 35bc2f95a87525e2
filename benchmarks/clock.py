"""The monitor's own clock against pairs of trainings, with it and without, on three models.

    python -m benchmarks.clock                 # about six minutes, on a quiet machine
    python -m benchmarks.clock --only "MLP on digits, batch 128, every 50"   # rows that have this in their name

`lowrank/rank_overhead_percent` is the increase of training time, as pairs measure it. Pairs are as noisy as the
machine; medians of the steps at each place of the cadence, with the monitor and without, are less so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryDirectory

import lightning as L
import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.overhead import Steps, quiet
from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import RankMonitor


class Digits(L.LightningModule):
    """A classifier of handwritten digits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def mlp() -> L.LightningModule:
    """64-256-256-10."""
    hidden = [layer for width in (64, 256) for layer in (nn.Linear(width, 256), nn.ReLU())]
    return Digits(nn.Sequential(*hidden, nn.Linear(256, 10)))


def conv() -> L.LightningModule:
    """Three convolutions of 64 channels."""
    layers = [layer for width in (1, 64, 64) for layer in (nn.Conv2d(width, 64, 3, padding=1), nn.ReLU())]
    return Digits(nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(64 * 64, 10)))


def text() -> L.LightningModule:
    """The demo's transformer."""
    return CharTransformer(vocabulary=100)


@dataclass(frozen=True)
class Case:
    """A training, and how often it is watched."""

    what: str
    make: Callable[[], L.LightningModule]
    batch_size: int
    steps: int
    every: int

    def seconds(self, data: TensorDataset, *callbacks: L.Callback) -> float:
        """Of one training, loggers included."""
        torch.manual_seed(0)
        model, batches = self.make(), DataLoader(data, self.batch_size, drop_last=True)
        with TemporaryDirectory() as folder:
            trainer = L.Trainer(
                accelerator="cpu",
                max_steps=self.steps,
                callbacks=[*callbacks],
                logger=TensorBoardLogger(folder),
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            begin = time.perf_counter()
            trainer.fit(model, batches)
            return time.perf_counter() - begin

    def row(self, data: TensorDataset, pairs: int) -> list[str]:
        """Milliseconds a step, and the increase by pairs, by medians of steps, and by the clock."""
        more, clock = [], []
        plain, watched = list[NDArray[np.float64]](), list[NDArray[np.float64]]()
        for pair in range(pairs):
            monitor, ends = RankMonitor(every_n_steps=self.every), (Steps(), Steps())
            # First one goes first, then the other: what drifts cancels.
            runs: list[list[L.Callback]] = [[ends[0]], [monitor, ends[1]]]
            taken = {len(run): self.seconds(data, *run) for run in (runs if pair % 2 else runs[::-1])}
            more.append(100 * (taken[2] / taken[1] - 1))
            clock.append(monitor.overhead)
            plain.append(np.diff(ends[0].ends))
            watched.append(np.diff(ends[1].ends))
        usual, slower = self.of_places(plain), self.of_places(watched)
        medians = f"{100 * (slower.sum() / usual.sum() - 1):.1f}"
        return [self.what, f"{1000 * np.median(usual):.2f}", str(self.every), told(more), medians, told(clock)]

    def of_places(self, steps: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """The median of steps at each place of the cadence, over all runs; without those of the first sample."""
        together, place = np.stack(steps)[:, self.every :], np.arange(len(steps[0]) - self.every) % self.every
        return np.array([np.median(together[:, place == at]) for at in range(self.every)])


def told(values: list[float]) -> str:
    """Median and range."""
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


CASES = [
    Case("char transformer, 8 x 64", text, 8, 60, 2),
    Case("char transformer, 8 x 64", text, 8, 100, 10),
    Case("conv net on digits, batch 128", conv, 128, 100, 2),
    Case("conv net on digits, batch 128", conv, 128, 200, 10),
    Case("MLP on digits, batch 128", mlp, 128, 400, 10),
    Case("MLP on digits, batch 128", mlp, 128, 1000, 50),
]


def main(pairs: int = 7, only: str = "") -> None:
    """Print the table.

    Args:
        pairs: Trainings with and without, of each row.
        only: Rows that have this in their name, such as "MLP", and nothing else.
    """
    quiet()
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    windows = TensorDataset(standard_library())
    table = Table(title=f"Cost of watching by pairs and by the clock, one thread, {pairs} pairs a row")
    for heading in ("model", "step, ms", "every", "by pairs, % (range)", "by medians, %", "by the clock, % (range)"):
        table.add_column(heading)
    for case in (case for case in CASES if only in f"{case.what}, every {case.every}"):
        data = windows if case.make is text else digits
        case.seconds(data, RankMonitor(every_n_steps=case.every))  # warms up
        table.add_row(*case.row(data, pairs))
    Console(width=140).print(table)


if __name__ == "__main__":
    auto_cli(main)
