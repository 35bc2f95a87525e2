"""Count the outlying eigenvalues of the Hessian: one less than there are classes?

    python examples/hessian_outliers.py --output hessian_outliers.png

The Hessian and the Gauss-Newton matrix of a classifier are said to have a bulk near 0 and one eigenvalue less than
there are classes far outside of it (Sagun et al. 2017, arXiv 1706.04454; Gur-Ari et al. 2018, arXiv 1812.04754; Papyan
2020, arXiv 2008.11865). Here that is looked at for handwritten digits, of which two to ten are told apart, with an MLP
and a convolutional network, and for a small transformer that writes text. The outliers are what comes before the
largest ratio of an eigenvalue to the next, among three more than classes.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
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

from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import CurvatureMonitor

OPERATORS = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton"}
# The most frequent ones of the text, which are its classes.
CHARACTERS = 30


class Classifier(L.LightningModule):
    """Tells images apart."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Spectra(Logger):
    """Keeps the eigenvalues that a monitor tells.

    Attributes:
        found: Operator -> step -> eigenvalues, largest first.
    """

    name, version = "spectra", 0

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.found: dict[str, dict[int, list[float]]] = {operator: {} for operator in OPERATORS}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the eigenvalues among them."""
        for operator, spectra in self.found.items():
            tags = [f"curvature/{operator}_lambda_{i}" for i in ("max", *range(2, self.top_k + 1))]
            if tags[0] in metrics:
                spectra[step or 0] = [metrics[tag] for tag in tags]

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are no eigenvalues."""


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        title: What is trained.
        classes: How many are told apart.
        model: Not trained yet.
        data: What it is trained on.
        batch_size: Examples of a batch.
        max_steps: How long.
        seen: Examples whose loss has its curvature measured.
    """

    title: str
    classes: int
    model: Callable[[], L.LightningModule]
    data: TensorDataset
    batch_size: int
    max_steps: int
    seen: int = 500


def digits(classes: int) -> TensorDataset:
    """Handwritten ones, of the first so many kinds."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    chosen = labels < classes
    return TensorDataset(images[chosen].float() / 16, labels[chosen])


def mlp(classes: int) -> L.LightningModule:
    """Two hidden layers."""
    return Classifier(
        nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes))
    )


def conv_net(classes: int) -> L.LightningModule:
    """Two convolutions."""
    convolutions = [
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
    ]
    return Classifier(nn.Sequential(*convolutions, nn.Linear(128, classes)))


def text_model() -> L.LightningModule:
    """A small transformer."""
    return CharTransformer(CHARACTERS, depth=2, width=32, heads=2)


def trained(case: Case) -> Spectra:
    """Eigenvalues at the start, in the middle and at the end of a training."""
    L.seed_everything(0, verbose=False)
    spectra = Spectra(case.classes + 3)
    seen = [column[: case.seen] for column in case.data.tensors]
    chosen: dict[str, Any] = {
        "loss_fn": lambda module, _: module.training_step(seen),
        "detail": "standard",
        "per_site": False,
    }
    # Twice as many are followed as are looked at, so that these are accurate at the first sample too.
    monitor = CurvatureMonitor("standard", list(OPERATORS), 2 * spectra.top_k, case.max_steps // 2, **chosen)
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    trainer = L.Trainer(max_steps=case.max_steps + 1, max_epochs=-1, callbacks=[monitor], logger=spectra, **silent)
    trainer.fit(case.model(), DataLoader(case.data, case.batch_size, shuffle=True, drop_last=True))
    return spectra


def ratios(eigenvalues: list[float]) -> list[float]:
    """Of each to the next, as long as they are above 0."""
    return [here / after for here, after in pairwise(eigenvalues) if after > 0]


def outliers(eigenvalues: list[float]) -> int:
    """How many come before the largest ratio."""
    found = ratios(eigenvalues)
    return 1 + found.index(max(found))


def cases(share: float) -> list[Case]:
    """All trainings; the digits by number of classes, one for longer, then another net and other data."""
    steps = 2 * max(1, int(100 * share))
    sweep = [Case("MLP", classes, partial(mlp, classes), digits(classes), 32, steps) for classes in range(2, 11)]
    longer = Case("MLP, longer", 10, partial(mlp, 10), digits(10), 32, 10 * steps)
    convolutional = Case("conv net", 10, partial(conv_net, 10), digits(10), 32, steps)
    transformer = Case(
        "transformer", CHARACTERS, text_model, TensorDataset(standard_library(CHARACTERS)), 16, steps, seen=8
    )
    return [*sweep, longer, convolutional, transformer]


def draw(found: list[tuple[Case, Spectra]], output: Path) -> None:
    """Eigenvalues of the last case of each kind, and what was counted by classes."""
    import matplotlib.pyplot as plt

    last = {case.title: (case, spectra) for case, spectra in found}
    figure, panels = plt.subplots(1, len(last) + 1, figsize=(4.2 * (len(last) + 1), 3.4), squeeze=False)
    for panel, (case, spectra) in zip(panels[0], last.values(), strict=False):
        for (operator, label), style in zip(OPERATORS.items(), ("-", ":"), strict=True):
            for i, (step, values) in enumerate(spectra.found[operator].items()):
                panel.plot(
                    range(1, len(values) + 1), values, style, marker=".", color=f"C{i}", label=f"{label}, step {step}"
                )
        panel.axvline(case.classes - 0.5, color="black", linestyle="dashed", linewidth=1, label="classes - 1")
        panel.set(title=f"{case.title}, {case.classes} classes", xlabel="rank of the eigenvalue", yscale="log")
    by_classes = [(case, spectra) for case, spectra in found if case.title == found[0][0].title]
    for (operator, label), marker in zip(OPERATORS.items(), ("o", "x"), strict=True):
        counts = [outliers(list(spectra.found[operator].values())[1]) for _, spectra in by_classes]
        panels[0, -1].plot([case.classes for case, _ in by_classes], counts, marker, label=label)
    kinds = [case.classes for case, _ in by_classes]
    panels[0, -1].plot(kinds, [classes - 1 for classes in kinds], "k--", linewidth=1, label="classes - 1")
    panels[0, -1].set(title=f"{found[0][0].title}, in the middle", xlabel="classes", ylabel="outliers")
    panels[0, 0].set_ylabel("eigenvalue")
    for panel in panels[0]:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def table(found: list[tuple[Case, Spectra]]) -> Table:
    """What was counted."""
    made = Table(
        title="Outlying eigenvalues; ratio to the next: there, and after as many as there are classes less one"
    )
    headings = [f"{label}: {what}" for label in OPERATORS.values() for what in ("outliers", "ratio", "at classes - 1")]
    for heading in ("training", "classes", "step", *headings):
        made.add_column(heading, justify="left" if heading == "training" else "right", overflow="fold")
    for case, spectra in found:
        for step in spectra.found["hessian"]:
            row = [cell for operator in OPERATORS for cell in counted(spectra.found[operator][step], case.classes)]
            made.add_row(case.title, str(case.classes), str(step), *row)
    return made


def counted(eigenvalues: list[float], classes: int) -> list[str]:
    """Outliers, the ratio there, and at classes - 1."""
    found = ratios(eigenvalues)
    return [
        str(outliers(eigenvalues)),
        f"{max(found):.1f}",
        f"{found[classes - 2]:.1f}" if len(found) > classes - 2 else "-",
    ]


def main(output: Path = Path("hessian_outliers.png"), share: float = 1.0, only: str = "") -> None:
    """Train, count outliers at the start, in the middle and at the end, and draw the spectra.

    Args:
        output: Image to write.
        share: Of the steps.
        only: Title of the trainings to look at, as in the table; all unless given.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = [(case, trained(case)) for case in cases(share) if only in ("", case.title)]
    rich.print(table(found))
    draw(found, output)
    print(f"The spectra are in {output}")


if __name__ == "__main__":
    auto_cli(main)
