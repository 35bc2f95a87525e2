"""What large models cost: 1,000 layers, and one embedding of 250,000 x 64. Processor time of a sample, memory at its
peak, scalars written.

    python -m benchmarks.load

Each training is in a process of its own, on one thread; memory is the peak beyond that of the same training without a
monitor.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.overhead import quiet
from lightning_lowrank import RankMonitor

STEPS = 4


class Layers(nn.Module):
    """Residual layers one after the other, so that gradients reach the first."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / len(self.layers)
        return x


class Words(nn.Module):
    """An embedding and little else."""

    def __init__(self, num_words: int, width: int, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(num_words, width, sparse=sparse), nn.Linear(width, 10)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).mean(1))


class Trained(L.LightningModule):
    """A network with a loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        sparse = any(isinstance(m, nn.Embedding) and m.sparse for m in self.modules())
        return (torch.optim.SGD if sparse else torch.optim.AdamW)(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Case:
    """One row: a network, what it is fed, and what is watched."""

    what: str
    net: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    options: dict[str, Any]


def rows() -> Tensor:
    """Inputs of the layers."""
    return torch.randn(8 * STEPS, 32, generator=torch.Generator().manual_seed(0))


def words() -> Tensor:
    """Inputs of the embedding: 32 words each."""
    return torch.randint(250_000, (8 * STEPS, 32), generator=torch.Generator().manual_seed(0))


def hundred_layers() -> nn.Module:
    """A tenth, to see whether cost is in proportion."""
    return Layers(100, 32)


def thousand_layers() -> nn.Module:
    """Tiny ones."""
    return Layers(1000, 32)


def embedding() -> nn.Module:
    """61 MiB of weights."""
    return Words(250_000, 64)


def sparse_embedding() -> nn.Module:
    """The same with sparse gradients."""
    return Words(250_000, 64, sparse=True)


SITES: dict[str, Any] = {"per_site": True}
FEATURES: dict[str, Any] = {"sources": ("gradients", "features")}
EVERYTHING: dict[str, Any] = {"sources": ("gradients", "weights", "updates", "displacement", "optimizer_state")}
CASES = [
    Case("100 layers of 32 x 32", hundred_layers, rows, {}),
    Case("1,000 layers of 32 x 32", thousand_layers, rows, {}),
    Case("  scalars of single sites", thousand_layers, rows, SITES),
    Case("  gradients and features", thousand_layers, rows, FEATURES),
    Case("embedding of 250,000 x 64", embedding, words, {}),
    Case("  displacement and state too", embedding, words, EVERYTHING),
    Case("  sparse gradients", sparse_embedding, words, {}),
]


@dataclass(frozen=True)
class Cost:
    """What one training cost.

    Attributes:
        memory: MiB that its process held at the peak.
        step: Median milliseconds of a step.
        scalars: That a sample wrote.
        failures: Failed measurements.
    """

    memory: float
    step: float
    scalars: int
    failures: int


class Watch(TensorBoardLogger):
    """Counts the scalars of the latest report."""

    num_scalars = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Count, and write."""
        self.num_scalars = len(metrics)
        super().log_metrics(metrics, step)


class Stopwatch(L.Callback):
    """Milliseconds of processor time from the end of a step to the end of the next, writers' threads included."""

    def __init__(self) -> None:
        self.ends = [0.0]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first begins with its batch."""
        self.ends[0] = self.ends[0] or time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Each ends when the callbacks before this one are through."""
        self.ends.append(time.process_time())

    @property
    def median(self) -> float:
        """Without the first step, in which much is done once."""
        return 1000 * median(end - begin for begin, end in zip(self.ends[1:-1], self.ends[2:], strict=True))


def cost(case: Case, *, watched: bool) -> Cost:
    """Of one training, in this process; Linux."""
    quiet()
    torch.manual_seed(0)
    monitors = [RankMonitor(every_n_steps=1, **case.options)] if watched else []
    clock = Stopwatch()
    with TemporaryDirectory() as folder:
        logger = Watch(folder)
        quietly: dict[str, Any] = {
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
        }
        trainer = L.Trainer(max_steps=STEPS, callbacks=[*monitors, clock], logger=logger, **quietly)
        trainer.fit(Trained(case.net()), DataLoader(TensorDataset(case.batch()), 8))
    # Not `ru_maxrss`: that of a child begins at its parent's.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return Cost(
        int(line.split()[1]) / 1024, clock.median, logger.num_scalars, sum(monitor.failures for monitor in monitors)
    )


def alone(case: Case) -> Cost:
    """Without a monitor."""
    return cost(case, watched=False)


def watched(case: Case) -> Cost:
    """With one that samples every step."""
    return cost(case, watched=True)


def row(case: Case) -> list[str]:
    """What the case costs."""
    costs = []
    for training in (alone, watched):
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            costs.append(pool.submit(training, case).result())
    plain, ours = costs
    times = (f"{value:,.0f}" for value in (plain.step, ours.step - plain.step))
    memory = (f"{value:,.0f}" for value in (plain.memory, ours.memory - plain.memory))
    return [case.what, *times, *memory, f"{ours.scalars:,}", str(ours.failures)]


def main() -> None:
    """Print the table."""
    table = Table(title=f"A sample every step, {STEPS} steps, milliseconds of processor time")
    headings = ("network", "step, ms", "sample, ms", "training, MiB", "more, MiB", "scalars", "failures")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for case in CASES:
        table.add_row(*row(case))
    Console(width=110).print(table)


if __name__ == "__main__":
    auto_cli(main)
