"""Whether a budget is kept: runs of 2,000 steps with `RankMonitor(max_overhead=...)`, on one thread.

    python -m benchmarks.budget

Of a model that is cheap to watch a sample takes a fraction of a training step, of an expensive one as much as still
leaves five samples at the smallest budget. The monitor's own clock says what was spent after the warm-up.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from benchmarks.overhead import quiet
from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import RankMonitor
from lightning_lowrank.measuring.schedules import Budget

# Of the budget: what is spent has to lie between.
LEAST, MOST = 0.4, 1.1


class DigitsMLP(L.LightningModule):
    """Three layers that tell handwritten digits apart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def digits() -> TensorDataset:
    """The 1,797 of scikit-learn."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))


@dataclass(frozen=True)
class Case:
    """What is trained on what, and how it is watched."""

    what: str
    make: Callable[[], L.LightningModule]
    data: Callable[[], TensorDataset]
    batch_size: int
    options: dict[str, Any]


CASES = [
    Case(
        "cheap: characters, moments of gradients",
        lambda: CharTransformer(vocabulary=100, depth=1, width=64),
        lambda: TensorDataset(standard_library()),
        64,
        {"sources": "gradients", "statistics": ("stable_rank", "participation_ratio"), "per_site": False},
    ),
    Case("expensive: digits, default", DigitsMLP, digits, 2304, {}),
]


def spent(case: Case, share: float, steps: int) -> Budget:
    """The budget after a training."""
    torch.manual_seed(0)
    data = case.data()
    # One epoch: beginning another takes longer than a step.
    sampler = RandomSampler(data, replacement=True, num_samples=case.batch_size * steps)
    monitor = RankMonitor(max_overhead=share, **case.options)
    with TemporaryDirectory() as folder:
        L.Trainer(
            max_steps=steps,
            callbacks=[monitor],
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(case.make(), DataLoader(data, case.batch_size, sampler=sampler))
    assert monitor.budget is not None
    return monitor.budget


def row(case: Case, share: float, steps: int) -> list[str]:
    """What was chosen and what was spent."""
    budget = spent(case, share, steps)
    times = [f"{1000 * seconds:.1f}" for seconds in (budget.step, budget.sample)]
    ratio = budget.overhead / (100 * share)
    verdict = "yes" if LEAST <= ratio <= MOST else "too few steps" if math.isnan(ratio) else "NO"
    return [
        case.what,
        *times,
        f"{100 * share:g}",
        f"{budget.every}",
        f"{budget.num_samples}",
        f"{budget.overhead:.3f}",
        f"{ratio:.2f}",
        verdict,
    ]


def main(steps: int = 2000, shares: Sequence[float] = (0.005, 0.01, 0.05)) -> None:
    """Print the table.

    Args:
        steps: Of each training.
        shares: The budgets.
    """
    quiet()
    table = Table(title=f"What a budget buys in {steps} steps, one thread; spent: of the time after the warm-up")
    for heading in (
        "what is watched",
        "step, ms",
        "sample, ms",
        "budget, %",
        "every",
        "samples",
        "spent, %",
        "of budget",
        f"{LEAST}-{MOST}",
    ):
        table.add_column(heading, justify="left" if heading == "what is watched" else "right")
    for case in CASES:
        for share in shares:
            table.add_row(*row(case, share, steps))
    Console(width=130).print(table)


if __name__ == "__main__":
    auto_cli(main)
