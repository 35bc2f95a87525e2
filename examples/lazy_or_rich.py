"""Is training lazy or rich? The tangent kernel of a network that learns handwritten digits: over training, by width,
and mode by mode.

    python examples/lazy_or_rich.py --output lazy_or_rich.png

A kernel turns fast while features are learnt, and then hardly at all (Fort et al. 2020, arXiv 2010.15110). The wider a
network in the tangent kernel's own scaling, the less it turns (Jacot et al. 2018, arXiv 1806.07572). What is learnt
first are the modes with the largest eigenvalues, each at its own rate.
"""

import math
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
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.edge_of_stability import Curves
from lightning_lowrank import NTKMonitor
from lightning_lowrank.maths.operators.operators import Jacobian
from lightning_lowrank.monitors.tangent_kernel.estimates import time_constants
from lightning_lowrank.monitors.tangent_kernel.kernels import exact_modes, kernel_operator

WIDTHS = (8, 32, 128, 512)
# Examples whose modes are followed one by one.
FEW = 64
RATE = 20.0
KERNEL = {
    "ntk/velocity": "velocity",
    "ntk/centred_label_alignment": "alignment with labels",
    "ntk/distance_to_start": "distance to start",
}


class Scaled(nn.Linear):
    """A layer whose weights are standard Gaussian and divided by the root of their number only when they are used: the
    kernel's scaling.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) / math.sqrt(self.in_features)


class Regression(L.LightningModule):
    """Tells digits apart by least squares on centred one-hot labels, by gradient descent."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Scaled(64, width), nn.Tanh(), Scaled(width, width), nn.Tanh(), Scaled(width, 10))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), targets(batch[1]))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Usual(L.LightningModule):
    """Tells digits apart as one would: PyTorch's own start, cross-entropy, Adam."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
        )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        make: The module.
        digits: How many are learnt.
        batch_size: Of these.
        steps: How long.
        every: Cadence of samples.
    """

    make: Callable[[], L.LightningModule]
    digits: int = 256
    batch_size: int = 256
    steps: int = 600
    every: int = 60


CASES = {"usual, width 64": Case(Usual, 1024, 64, 1000, 100)}
CASES |= {f"kernel's scaling, width {width}": Case(partial(Regression, width)) for width in WIDTHS}


def targets(labels: Tensor) -> Tensor:
    """One-hot labels less their mean."""
    return F.one_hot(labels, 10).float() - 0.1


def digits(num: int) -> tuple[Tensor, Tensor]:
    """Pixels and labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:num] / 16, dtype=torch.float32), torch.tensor(labels[:num])


def trained(case: Case, share: float) -> Curves:
    """What a training showed: the kernel of 64 digits, summed over the outputs."""
    L.seed_everything(0, verbose=False)
    steps, every = max(5, int(case.steps * share)), max(2, int(case.every * share))
    monitor, curves = NTKMonitor(every_n_steps=every, detail="all"), Curves()
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    trainer = L.Trainer(
        max_steps=steps + 1, max_epochs=-1, callbacks=[monitor], logger=curves, log_every_n_steps=every, **silent
    )
    batches = DataLoader(TensorDataset(*digits(case.digits)), case.batch_size, shuffle=case.batch_size < case.digits)
    trainer.fit(case.make(), batches)
    return curves


@dataclass(frozen=True)
class Modes:
    """Steps after which each mode of the kernel at the start is half learnt.

    Attributes:
        predicted: From its eigenvalue.
        seen: Infinite where it was not.
    """

    predicted: Tensor
    seen: Tensor

    def all_gather_object(self, width: int, num: int) -> str:
        """How well the first modes came as predicted."""
        predicted, seen = self.predicted[:num], self.seen[:num]
        learnt = torch.isfinite(seen)
        if learnt.sum() < 3:
            return f"width {width}: {int(learnt.sum())} of {len(seen)} half learnt"
        rank = rank_correlation(predicted[learnt], seen[learnt])
        ratios = (seen[learnt] / predicted[learnt]).sort().values
        low, middle, high = (float(ratios[int(part * (len(ratios) - 1))]) for part in (0.25, 0.5, 0.75))
        counts = f"{int(learnt.sum())} of the first {len(seen)} half learnt"
        return (
            f"width {width}: {counts}, rank correlation {rank:.2f}, seen over predicted {middle:.2f} "
            f"(quartiles {low:.2f} to {high:.2f})"
        )


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: 1 where both have the same order; equal values have the mean of their ranks."""
    ranks = [(x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1) for x in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1])


def modes_learnt(width: int, steps: int) -> Modes:
    """All modes of the full kernel of a few digits, which alone are learnt here, in float64."""
    L.seed_everything(0, verbose=False)
    images, labels = digits(FEW)
    net, images, goal = Regression(width).net.double(), images.double(), targets(labels).double()
    modes = exact_modes(kernel_operator(Jacobian(net(images), list(net.parameters())), "full"))

    def remaining() -> Tensor:
        """What is left to learn, along each mode."""
        with torch.no_grad():
            return modes.vectors @ (net(images) - goal).flatten()

    begin = remaining()
    half = torch.full_like(begin, math.inf)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        F.mse_loss(net(images), goal).backward()
        optimizer.step()
        half = torch.where(torch.isinf(half) & (remaining().abs() < begin.abs() / 2), float(step), half)
    # The mean over examples and outputs has a derivative of 2 / (R C).
    return Modes(math.log(2) * time_constants(modes, RATE * 2 / goal.numel()), half)


def draw(found: dict[str, Curves], modes: dict[int, Modes], output: Path) -> None:
    """The kernel over training, and modes one by one."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(KERNEL) + 1, figsize=(17, 3.6))
    for panel, (tag, label) in zip(panels, KERNEL.items(), strict=False):
        for name, curves in found.items():
            steps, values = curves.curve(tag)
            # Chance may put what is nothing below 0.
            panel.plot(
                steps, values if "alignment" in tag else [max(value, 1e-6) for value in values], ".-", label=name
            )
        panel.set(title=label, xlabel="step", yscale="linear" if "alignment" in tag else "log")
    for width, known in modes.items():
        panels[-1].loglog(known.predicted, known.seen, ".", label=f"width {width}")
    line = next(iter(modes.values())).predicted
    panels[-1].loglog(line, line, "k:")
    panels[-1].set(title="modes: half learnt at step", xlabel="predicted at the start", ylabel="seen")
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    panels[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def summary(found: dict[str, Curves]) -> Table:
    """First, middle and last samples of each training."""
    table = Table(title="The tangent kernel of 64 digits, summed over the outputs")
    for heading in (
        "training",
        "loss",
        "velocity: first",
        "middle",
        "last",
        "alignment: first",
        "last",
        "distance to start",
    ):
        table.add_column(heading, justify="left" if heading == "training" else "right", overflow="fold")
    for name, curves in found.items():
        (_, velocity), (_, alignment), (_, loss) = (
            curves.curve(tag) for tag in ("ntk/velocity", "ntk/centred_label_alignment", "loss")
        )
        moving = velocity[1:]
        aligned = [f"{value:.3f}" for value in (alignment[0], alignment[-1])]
        distance, error = (curves.curve(f"ntk/distance_to_start{end}")[1][-1] for end in ("", "_error"))
        speeds = [f"{value:.1g}" for value in (moving[0], moving[len(moving) // 2], moving[-1])]
        table.add_row(name, f"{loss[-1]:.3f}", *speeds, *aligned, f"{distance:.2g} +- {error:.1g}")
    return table


def main(output: Path = Path("lazy_or_rich.png"), share: float = 1.0) -> None:
    """Train five times, follow the modes of two more, print what was seen and draw it.

    Args:
        output: Image to write.
        share: Of the steps.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches")
    torch.set_num_threads(1)
    found = {name: trained(case, share) for name, case in CASES.items()}
    rich.print(summary(found))
    modes = {width: modes_learnt(width, max(3, int(3000 * share))) for width in (16, 256)}
    print(f"Modes of the full kernel of {FEW} digits, predicted from the spectrum at the start:")
    for width, known in modes.items():
        for num in (50, len(known.seen)):
            print(f"  {known.all_gather_object(width, num)}")
    draw(found, modes, output)
    print(f"The curves are in {output}")


if __name__ == "__main__":
    auto_cli(main)
