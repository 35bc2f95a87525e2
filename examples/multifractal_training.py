"""Watch neurons become unlike each other: a transformer, an MLP and a convolutional net, beside what chance and growing
norms give.

    python examples/multifractal_training.py --output multifractal.png

NeuroMFA (Xiao et al. 2025, arXiv 2402.09099) reports that training widens the multifractal spectrum of the network of
neurons and moves it to the left, and sums that up as a degree of emergence. Here the same is measured on the weights,
on the same weights with their entries shuffled, and on Gaussian weights of the same variance: what all three share is
no structure. Then, matrix by matrix and free of scale, whether neurons differ by more than chance.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import rich
import torch
from jsonargparse import auto_cli
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.char_transformer import CharTransformer, standard_library
from examples.edge_of_stability import Curves
from lightning_lowrank import MultifractalMonitor

NETWORKS = {"": "trained", "_shuffled": "entries shuffled", "_gaussian": "Gaussian, same variance"}


class Digits(L.LightningModule):
    """Tells digits apart."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def perceptron() -> Digits:
    """An MLP."""
    return Digits(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)))


def convolutional() -> Digits:
    """Three convolutions of 64 channels."""
    image, layers = (
        nn.Unflatten(1, (1, 8, 8)),
        [nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3)],
    )
    body = [part for layer in layers for part in (layer, nn.ReLU())]
    return Digits(nn.Sequential(image, *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)))


def digits() -> TensorDataset:
    """Handwritten ones."""
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))


def at(curves: Curves, tag: str, end: int) -> float:
    """The first (0) or last (-1) value."""
    return list(curves.points.get(tag, {0: nan}).values())[end]


def sites(curves: Curves, quantity: str) -> Iterator[tuple[str, dict[int, float]]]:
    """Those that ever have a number, with their curves."""
    for tag, curve in curves.points.items():
        if tag.startswith(f"{quantity}/") and any(map(isfinite, curve.values())):
            yield tag.partition("/")[2], curve


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        title: Of its panels.
        make: The module.
        data: What it learns.
        batch_size: Examples of a batch.
        max_steps: How long.
    """

    title: str
    make: Callable[[], L.LightningModule]
    data: Callable[[], TensorDataset]
    batch_size: int
    max_steps: int


CASES = [
    Case(
        "character transformer",
        lambda: CharTransformer(vocabulary=100),
        lambda: TensorDataset(standard_library()),
        16,
        960,
    ),
    Case("digits, MLP", perceptron, digits, 64, 1200),
    Case("digits, convolutions", convolutional, digits, 64, 600),
]


def trained(case: Case, share: float) -> Curves:
    """What a training of the case showed, at thirteen steps."""
    L.seed_everything(0, verbose=False)
    steps = max(2, int(share * case.max_steps))
    every: dict[str, Any] = {"every_n_steps": max(1, steps // 12), "detail": "all", "per_site": True}
    monitors = [MultifractalMonitor("rank", **every), MultifractalMonitor("neuromfa", **every)]
    curves, batches = Curves(), DataLoader(case.data(), case.batch_size, shuffle=True, drop_last=True)
    silent: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False}
    # One step more: the last sample is of the weights that all others made.
    L.Trainer(max_steps=steps + 1, callbacks=[*monitors], logger=curves, log_every_n_steps=10, **silent).fit(
        case.make(), batches
    )
    return curves


def ends(curves: Curves, tag: str) -> str:
    """The first and the last value."""
    return f"{at(curves, tag, 0):.2f} -> {at(curves, tag, -1):.2f}"


def whole_model(found: list[tuple[Case, Curves]]) -> Table:
    """By the published recipe, first and last."""
    table = Table(title="The whole model by the published recipe, first -> last sample")
    for heading in ("training", "loss", "network", "alpha0", "width", "emergence", "valid"):
        table.add_column(heading, justify="left" if heading in ("training", "network") else "right", overflow="fold")
    for case, curves in found:
        for i, (end, what) in enumerate(NETWORKS.items()):
            both = [ends(curves, f"neuromfa/{name}{end}") for name in ("alpha0", "width")]
            share = curves.points[f"neuromfa/valid{end}"].values()
            last = f"{at(curves, f'neuromfa/emergence{end}', -1):.2f}", f"{sum(share) / len(share):.0%}"
            table.add_row(*("" if i else cell for cell in (case.title, ends(curves, "loss"))), what, *both, *last)
    return table


def beyond_chance(curves: Curves, end: int) -> str:
    """At how many sites neurons differ by more than chance gives one network in a hundred."""
    known = [
        (at(curves, f"multifractal_dispersion/{site}", end), at(curves, f"multifractal_dispersion_chance/{site}", end))
        for site, _ in sites(curves, "multifractal_dispersion")
    ]
    return f"{sum(seen > chance for seen, chance in known)} of {len(known)}"


def by_matrix(found: list[tuple[Case, Curves]]) -> Table:
    """In rank mode, first and last."""
    table = Table(title="Every matrix, free of scale: dispersion of its neurons, first -> last sample")
    for heading in ("training", "beyond chance", "median", "largest", "where", "spectrum at"):
        table.add_column(heading, justify="left" if heading in ("training", "where") else "right", overflow="fold")
    for case, curves in found:
        last = {site: list(curve.values())[-1] for site, curve in sites(curves, "multifractal_dispersion")}
        first = [next(iter(curve.values())) for _, curve in sites(curves, "multifractal_dispersion")]
        where = max(last, key=last.__getitem__)
        valid = [at(curves, f"multifractal_valid/{site}", -1) for site in last]
        cells = (
            f"{beyond_chance(curves, 0)} -> {beyond_chance(curves, -1)}",
            f"{median(first):.3f} -> {median(last.values()):.3f}",
        )
        table.add_row(
            case.title, *cells, f"{max(first):.2f} -> {last[where]:.2f}", where, f"{sum(valid):.0f} of {len(valid)}"
        )
    return table


def draw(found: list[tuple[Case, Curves]], output: Path) -> None:
    """Above the whole model, below every matrix."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(3, len(found), figsize=(4.4 * len(found), 8.4), squeeze=False)
    for (case, curves), (top, middle, bottom) in zip(found, panels.T, strict=True):
        for panel, name in ((top, "width"), (middle, "emergence")):
            for end, what in NETWORKS.items():
                points = curves.points[f"neuromfa/{name}{end}"]
                panel.plot(list(points), list(points.values()), label=what, linewidth=1.4 if end == "" else 1)
            panel.set(ylabel=f"{name}, whole model")
        for site, points in sites(curves, "multifractal_dispersion"):
            colour, style = ("tab:red", "solid") if site.endswith(".out") else ("tab:blue", "dashed")
            bottom.plot(list(points), list(points.values()), color=colour, linestyle=style, linewidth=0.8, alpha=0.7)
        bottom.plot([], [], color="tab:red", label="columns, outgoing weights")
        bottom.plot([], [], color="tab:blue", linestyle="dashed", label="rows, incoming weights")
        chance = max(max(points.values()) for _, points in sites(curves, "multifractal_dispersion_chance"))
        bottom.axhspan(-chance, chance, color="black", alpha=0.12, label="chance, at the smallest matrix")
        bottom.set(ylabel="dispersion, each matrix", xlabel="optimizer step")
        top.set_title(case.title)
        for panel in (top, middle, bottom):
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def main(output: Path = Path("multifractal.png"), share: float = 1.0) -> None:
    """Train three times, say what changed and what chance would have given, and draw it.

    Args:
        output: Image to write.
        share: Of the steps.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches")
    found = [(case, trained(case, share)) for case in CASES]
    rich.print(whole_model(found))
    rich.print(by_matrix(found))
    draw(found, output)
    print(f"The curves are in {output}")


if __name__ == "__main__":
    auto_cli(main)
