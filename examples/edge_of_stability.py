"""Watch training come to the edge of stability, and stay there: gradient descent, minibatches, Adam, on handwritten digits.

    python examples/edge_of_stability.py --output edge_of_stability.png

Full-batch gradient descent sharpens until the largest eigenvalue of the Hessian is 2 over the learning rate, and then hovers there (Cohen
et al. 2021, arXiv 2103.00065). Of minibatches it is the sharpness along the batch's own gradient that is to come there (Andreyev &
Beneventano 2024, arXiv 2412.20553), of Adam that of the preconditioned Hessian (Cohen et al. 2022, arXiv 2207.14484).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import rich
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import Logger
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank import CurvatureMonitor

EXAMPLES = 512


class Regression(L.LightningModule):
    """Tells digits apart by least squares on one-hot labels: what the papers use, since cross-entropy flattens once all is learnt."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.optimizer = optimizer

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = F.mse_loss(self.net(images), F.one_hot(labels, 10).float())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Curves(Logger):
    """Keeps what a monitor tells, to draw it."""

    name, version = "curves", 0

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep them by tag and step."""
        for tag, value in metrics.items():
            self.points.setdefault(tag, {})[step or 0] = value

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are no curves."""

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        """Steps and values."""
        return list(self.points[tag]), list(self.points[tag].values())


@dataclass(frozen=True)
class Case:
    """A training, and the curvature that comes to an edge in it.

    Attributes:
        title: Of its panel.
        curvature: Tag -> what it is.
        edge: Where that is unstable.
        optimizer: With its options.
        batch_size: Examples of a batch.
        max_steps: How long.
    """

    title: str
    curvature: dict[str, str]
    edge: float
    optimizer: Callable[..., torch.optim.Optimizer]
    batch_size: int = EXAMPLES
    max_steps: int = 2000


SHARPNESS = {
    "hessian_lambda_max": "largest eigenvalue",
    "batch_sharpness": "along the gradient",
    "critical_sharpness": "critical sharpness",
}
PRECONDITIONED = {"sharpness_over_threshold": "largest eigenvalue, preconditioned"}

CASES = [
    Case("Full-batch gradient descent, 0.5", SHARPNESS, 4.0, partial(torch.optim.SGD, lr=0.5)),
    Case("Full-batch gradient descent, 1.0", SHARPNESS, 2.0, partial(torch.optim.SGD, lr=1.0)),
    Case("Batches of 32, 0.5", SHARPNESS, 4.0, partial(torch.optim.SGD, lr=0.5), batch_size=32),
    Case("Full-batch Adam, 0.001", PRECONDITIONED, 1.0, partial(torch.optim.Adam, lr=1e-3)),
]


def trained(case: Case, share: float) -> Curves:
    """What a training of the case showed."""
    L.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images[:EXAMPLES] / 16, dtype=torch.float32), torch.tensor(labels[:EXAMPLES]))
    batches = DataLoader(data, case.batch_size, shuffle=case.batch_size < EXAMPLES)
    monitor, curves = CurvatureMonitor("standard", ["hessian"], top_k=1, every_n_steps=50), Curves()
    steps = max(51, int(share * case.max_steps))
    silent: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False}
    L.Trainer(max_steps=steps, callbacks=[monitor], logger=curves, log_every_n_steps=10, **silent).fit(Regression(case.optimizer), batches)
    return curves


def draw(found: list[tuple[Case, Curves]], output: Path) -> None:
    """A panel per training."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.4))
    for panel, (case, curves) in zip(panels, found, strict=True):
        for tag, label in case.curvature.items():
            panel.plot(*curves.curve(tag), label=label, linewidth=1.2)
        panel.axhline(case.edge, color="black", linestyle="dashed", linewidth=1, label="edge of stability")
        panel.set(title=case.title, xlabel="optimizer step", ylim=(0, 1.6 * case.edge))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("curvature")
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def main(output: Path = Path("edge_of_stability.png"), share: float = 1.0) -> None:
    """Train four times, say where the curvature ended up, and draw it.

    Args:
        output: Image to write.
        share: Of the steps: with less of them the edge is not reached.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches")
    found = [(case, trained(case, share)) for case in CASES]
    table = Table(title="Mean over the last quarter of the samples")
    for heading in ("training", "curvature", "mean", "edge"):
        table.add_column(heading, justify="left" if heading in ("training", "curvature") else "right")
    for case, curves in found:
        for tag, label in case.curvature.items():
            _, values = curves.curve(tag)
            last = values[-max(1, len(values) // 4) :]
            table.add_row(case.title, label, f"{sum(last) / len(last):.2f}", f"{case.edge:.2f}")
    rich.print(table)
    draw(found, output)
    print(f"The curves are in {output}")


if __name__ == "__main__":
    auto_cli(main)
