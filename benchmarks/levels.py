"""Levels of ranks in health by optimizer: median effective ranks of an MLP on digits, as shares of those of noise.

python -m benchmarks.levels
"""

from collections.abc import Iterator
from statistics import median

import lightning as L
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch.optim import SGD, AdamW, Muon

from benchmarks.faults.nets import mlp
from benchmarks.faults.recording import Memory
from benchmarks.faults.trainings import Optimizer, Run, classes, train
from benchmarks.overhead import quiet
from lightning_lowrank import RankMonitor


def levels(optimizer: Optimizer, rate: float) -> Iterator[str]:
    """The first ten samples and the last ten, of gradients, updates and weights."""
    L.seed_everything(10, verbose=False)
    monitor, memory = RankMonitor(statistics="relative_effective_rank", every_n_steps=10), Memory()
    train(Run(mlp(4, bias=False), classes, optimizer, rate), 1000, monitor, logger=memory)
    for source in ("gradient", "update", "weight"):
        curve = list(memory.curves[f"rank/{source}_relative_effective_rank_median"].values())
        yield f"{median(curve[:10]):.2f} to {median(curve[-10:]):.2f}"


def main() -> None:
    """Print the table."""
    quiet()
    table = Table("optimizer", "gradients", "updates", "weights", title="Median effective rank, of a Gaussian matrix 1")
    for name, optimizer, rate in (("AdamW", AdamW, 1e-3), ("SGD", SGD, 0.1), ("Muon", Muon, 0.02)):
        table.add_row(name, *levels(optimizer, rate))
    Console(width=110).print(table)


if __name__ == "__main__":
    auto_cli(main)
