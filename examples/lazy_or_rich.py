"""Is training lazy or rich? The tangent kernel of a network that learns handwritten digits: over training, by width, and mode by mode.

    python examples/lazy_or_rich.py --output lazy_or_rich.png

A kernel turns fast while features are learnt, and then hardly at all (Fort et al. 2020, arXiv 2010.15110). The wider a network in the
tangent kernel's own scaling, the less it turns (Jacot et al. 2018, arXiv 1806.07572). What is learnt first are the modes with the largest
eigenvalues, each at its own rate.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import rich
import torch
from edge_of_stability import Curves  # type: ignore[import-not-found]
from jsonargparse import auto_cli
from rich.table import Table
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank import NTKMonitor
from lightning_lowrank.kernels import exact_modes, kernel_operator
from lightning_lowrank.operators import Jacobian

WIDTHS = (16, 64, 256, 1024)
# Examples whose modes are followed one by one.
FEW = 64


class Scaled(nn.Linear):
    """A layer whose weights are standard Gaussian and divided by the root of their number only when they are used: the kernel's scaling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) / math.sqrt(self.in_features)


class Regression(L.LightningModule):
    """Tells digits apart by least squares on centred one-hot labels."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.net = nn.Sequential(Scaled(64, width), nn.Tanh(), Scaled(width, width), nn.Tanh(), Scaled(width, 10))
        self.rate = rate

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = F.mse_loss(self.net(images), targets(labels))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def targets(labels: Tensor) -> Tensor:
    """One-hot labels less their mean."""
    return F.one_hot(labels, 10).float() - 0.1


def digits(num: int) -> tuple[Tensor, Tensor]:
    """Pixels and labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:num] / 16, dtype=torch.float32), torch.tensor(labels[:num])


def trained(width: int, steps: int, every: int) -> Curves:
    """Full batches of 512 digits, and the kernel of 64 of them."""
    L.seed_everything(0, verbose=False)
    monitor, curves = NTKMonitor(kernel="full", num_examples=64, num_projections=32, every_n_steps=every), Curves()
    silent: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_steps=steps, callbacks=[monitor], logger=curves, log_every_n_steps=every, **silent)
    trainer.fit(Regression(width, 20.0), DataLoader(TensorDataset(*digits(512)), 512))
    return curves


def modes_learnt(width: int, steps: int) -> tuple[Tensor, Tensor]:
    """Of every mode of the kernel at the start: when it should be half learnt, and when it was; infinite where it was not."""
    L.seed_everything(0, verbose=False)
    rate, (images, labels) = 20.0, digits(FEW)
    module = Regression(width, rate).double()
    goal = targets(labels).double()
    outputs = module.net(images.double())
    modes = exact_modes(kernel_operator(Jacobian(outputs, list(module.parameters())), "full"))

    def remaining() -> Tensor:
        """What is left to learn, along each mode."""
        with torch.no_grad():
            return modes.vectors @ (module.net(images.double()) - goal).flatten()

    begin = remaining()
    half = torch.full_like(begin, math.inf)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        F.mse_loss(module.net(images.double()), goal).backward()
        optimizer.step()
        half = torch.where(torch.isinf(half) & (remaining().abs() < begin.abs() / 2), float(step), half)
    # The mean over examples and outputs has a derivative of 2 / (R C).
    predicted = math.log(2) / (rate * 2 / goal.numel() * modes.values)
    return predicted, half


def draw(over: dict[int, Curves], predicted: Tensor, half: Tensor, output: Path) -> None:
    """Velocity and alignment over training, distance by width, and modes one by one."""
    import matplotlib.pyplot as plt

    figure, (first, second, third, fourth) = plt.subplots(1, 4, figsize=(17, 3.6))
    for width, curves in over.items():
        first.plot(*curves.curve("ntk_velocity"), label=f"width {width}")
        second.plot(*curves.curve("ntk_centred_label_alignment"), label=f"width {width}")
        third.plot(*curves.curve("ntk_distance_to_start"), label=f"width {width}")
    first.set(title="velocity, between samples", xlabel="step", yscale="log")
    second.set(title="alignment with the labels, centred", xlabel="step")
    third.set(title="distance to the start", xlabel="step", yscale="log")
    fourth.loglog(predicted, half, ".", predicted, predicted, "k:")
    fourth.set(title="modes: half learnt at step", xlabel="predicted at the start", ylabel="seen")
    first.legend()
    for panel in (first, second, third, fourth):
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def main(output: Path = Path("lazy_or_rich.png"), share: float = 1.0) -> None:
    """Train four widths, follow the modes of one, print both and draw them.

    Args:
        output: Image to write.
        share: Of the steps.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches")
    torch.set_num_threads(1)
    steps, every = max(3, int(1200 * share)), max(1, int(60 * share))
    over = {width: trained(width, steps + 1, every) for width in WIDTHS}
    table = Table(title="The tangent kernel of 64 digits")
    for heading in ("width", "loss", "velocity, first", "middle", "last", "alignment, first", "last", "distance to start"):
        table.add_column(heading, justify="right")
    for width, curves in over.items():
        _, velocity = curves.curve("ntk_velocity")
        _, alignment = curves.curve("ntk_centred_label_alignment")
        speeds = [velocity[1], velocity[len(velocity) // 2], velocity[-1]]
        known = [*speeds, alignment[0], alignment[-1], curves.curve("ntk_distance_to_start")[1][-1]]
        table.add_row(str(width), f"{curves.curve('loss')[1][-1]:.4f}", *(f"{value:.2g}" for value in known))
    rich.print(table)
    predicted, half = modes_learnt(256, max(3, int(3000 * share)))
    seen = torch.isfinite(half)
    rank = float(spearmanr(predicted[seen], half[seen]).statistic) if seen.sum() > 2 else math.nan
    ratio = (half[seen] / predicted[seen]).log10()
    apart = f"seen over predicted: median {10 ** float(ratio.median()):.2f}" if seen.any() else "none yet"
    print(f"{int(seen.sum())} of {len(half)} modes came to be half learnt; order as predicted: rank correlation {rank:.2f}; {apart}")
    draw(over, predicted, half, output)
    print(f"The curves are in {output}")


if __name__ == "__main__":
    auto_cli(main)
