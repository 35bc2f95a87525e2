"""Watch training come to the edge of stability, and stay there: gradient descent, minibatches, Adam, on handwritten
digits.

    python examples/edge_of_stability.py --output edge_of_stability.png

Full-batch gradient descent sharpens until the largest eigenvalue of the Hessian is 2 over the learning rate, and then
hovers there (Cohen et al. 2021, arXiv 2103.00065). Of Adam it is that of the preconditioned Hessian (Cohen et al. 2022,
arXiv 2207.14484). Of minibatches it is said to be the sharpness along the batch's own gradient (Andreyev & Beneventano
2024, arXiv 2412.20553); that is not what is seen here.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
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
    """Tells digits apart by least squares on one-hot labels: what the papers use, since cross-entropy flattens once all
    is learnt.
    """

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

    def curve(self, tag: str, window: int = 1) -> tuple[list[int], list[float]]:
        """Steps and values, each the mean over so many samples."""
        points = list(self.points[tag].items())
        parts = [points[i : i + window] for i in range(0, len(points), window)]
        return [part[-1][0] for part in parts], [fmean(value for _, value in part) for part in parts]


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
        examples: Digits to learn.
    """

    title: str
    curvature: dict[str, str]
    edge: float
    optimizer: Callable[..., torch.optim.Optimizer]
    batch_size: int = EXAMPLES
    max_steps: int = 2000
    examples: int = EXAMPLES


SHARPNESS = {
    "curvature/hessian_lambda_max": "largest eigenvalue",
    "curvature/batch_sharpness": "along the gradient",
    "curvature/critical_sharpness": "critical sharpness",
}
STOCHASTIC = {
    "curvature/batch_sharpness": "along the batch's gradient",
    "all_curvature/hessian_lambda_max": "largest eigenvalue, all examples",
}
PRECONDITIONED = {"curvature/sharpness_over_threshold": "largest eigenvalue, preconditioned"}

CASES = [
    Case("Full-batch gradient descent, 0.5", SHARPNESS, 4.0, partial(torch.optim.SGD, lr=0.5)),
    Case("Full-batch gradient descent, 1.0", SHARPNESS, 2.0, partial(torch.optim.SGD, lr=1.0)),
    Case("Batches of 16 of 64, 1.0", STOCHASTIC, 2.0, partial(torch.optim.SGD, lr=1.0), 16, 4000, 64),
    Case("Batches of 32 of 512, 0.5", STOCHASTIC, 4.0, partial(torch.optim.SGD, lr=0.5), 32, 4000),
    Case("Full-batch Adam, 0.001", PRECONDITIONED, 1.0, partial(torch.optim.Adam, lr=1e-3)),
]


def trained(case: Case, share: float) -> Curves:
    """What a training of the case showed."""
    L.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(
        torch.tensor(images[: case.examples] / 16, dtype=torch.float32), torch.tensor(labels[: case.examples])
    )
    batches, curves = DataLoader(data, case.batch_size, shuffle=case.batch_size < case.examples), Curves()
    steps = max(51, int(share * case.max_steps))
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, callbacks=monitors(case, data), logger=curves, log_every_n_steps=10, **silent
    )
    trainer.fit(Regression(case.optimizer), batches)
    return curves


def monitors(case: Case, data: TensorDataset) -> list[L.Callback]:
    """Of the loss that is descended; where that is a batch's, of the batches often, since each has its own, and of all
    examples.
    """
    if case.batch_size == case.examples:
        return [CurvatureMonitor("standard", ["hessian"], top_k=1, every_n_steps=50)]
    everything: dict[str, Any] = {"loss_fn": lambda module, _: module.training_step(list(data.tensors)), "name": "all"}
    return [
        CurvatureMonitor(every_n_steps=10),
        CurvatureMonitor("standard", ["hessian"], top_k=1, every_n_steps=200, **everything),
    ]


def draw(found: list[tuple[Case, Curves]], output: Path) -> None:
    """A panel per training."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.4), squeeze=False)
    for panel, (case, curves) in zip(panels[0], found, strict=True):
        for tag, label in case.curvature.items():
            # Each batch has its own, of which the mean is what is spoken of.
            window = 20 if tag.endswith("/batch_sharpness") and case.curvature is STOCHASTIC else 1
            panel.plot(*curves.curve(tag, window), label=label, linewidth=1.2)
        panel.axhline(case.edge, color="black", linestyle="dashed", linewidth=1, label="edge of stability")
        panel.set(title=case.title, xlabel="optimizer step", ylim=(0, 1.6 * case.edge))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0, 0].set_ylabel("curvature")
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def main(output: Path = Path("edge_of_stability.png"), share: float = 1.0, only: str = "") -> None:
    """Train five times, say where the curvature ended up, and draw it.

    Args:
        output: Image to write.
        share: Of the steps: with less of them the edge is not reached.
        only: Title of the training to look at, as in the table; all unless given.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches")
    found = [(case, trained(case, share)) for case in CASES if only in ("", case.title)]
    table = Table(title="Mean over the last quarter of the samples")
    for heading in ("training", "curvature", "mean", "edge"):
        table.add_column(heading, justify="left" if heading in ("training", "curvature") else "right", overflow="fold")
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
