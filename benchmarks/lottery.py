"""What tickets of `LotteryTicket` learn beside the same masks from other starts and beside random masks, on digits.

python -m benchmarks.lottery           # MLP and convolutional net, 10 densities, three seeds; three widths
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from statistics import mean

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank import LotteryTicket

ROUNDS, PRUNE, EPOCHS, BATCH = 10, 0.31, 15, 64
WIDTHS = (75, 300, 1200)
KINDS = ("ticket", "new start", "random mask")
Nets = dict[str, Callable[[], nn.Module]]


def mlp(width: int) -> nn.Module:
    """Two hidden layers, as LeNet-300-100 has."""
    hidden = width // 3
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def convolutional() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


NETS: Nets = {"MLP 300-100": lambda: mlp(300), "convolutional": convolutional}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Two thirds to train on, and the rest; always the same."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return TensorDataset(x[order[:1200]], y[order[:1200]]), TensorDataset(x[order[1200:]], y[order[1200:]])


class Digits(L.LightningModule):
    """A net that trains by Adam, and says its accuracy at each validation."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.accuracies: list[float] = []
        self.masks: list[dict[str, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.accuracies.append((self.net(batch[0]).argmax(1) == batch[1]).double().mean().item())
        self.masks.append({name: p != 0 for name, p in self.net.named_parameters() if p.ndim > 1})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1.2e-3)


def tickets(make: Callable[[], nn.Module], seed: int) -> Digits:
    """Accuracies and masks at the end of each round."""
    train, held = digits()
    torch.manual_seed(seed)
    module = Digits(make())
    trainer = L.Trainer(
        max_epochs=ROUNDS * EPOCHS,
        check_val_every_n_epoch=EPOCHS,
        num_sanity_val_steps=0,
        callbacks=[LotteryTicket(ROUNDS, EPOCHS, PRUNE, every_n_steps=10**6)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    shuffled = DataLoader(train, BATCH, shuffle=True, drop_last=True)
    trainer.fit(module, shuffled, DataLoader(held, len(held)))
    return module


def control(make: Callable[[], nn.Module], masks: dict[str, Tensor], seed: int) -> float:
    """Accuracy of a net of another start under masks, after as many steps as a round has, in plain torch."""
    (x, y), (held, labels) = (dataset.tensors for dataset in digits())
    torch.manual_seed(1000 + seed)
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), lr=1.2e-3)

    def mask() -> None:
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name in masks:
                    parameter.mul_(masks[name])

    mask()
    for _ in range(EPOCHS):
        for places in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            optimizer.zero_grad()
            cross_entropy(net(x[places]), y[places]).backward()
            optimizer.step()
            mask()
    return (net(held).argmax(1) == labels).double().mean().item()


def at_random(masks: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Masks of the same number of weights in all, wherever they fall."""
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    shuffled = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))]
    parts = shuffled.split([mask.numel() for mask in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def densities(num: int = ROUNDS) -> list[float]:
    """Of each round."""
    return [(1 - PRUNE) ** i for i in range(num)]


def compared(name: str, make: Callable[[], nn.Module], seeds: Sequence[int]) -> Table:
    """Accuracy by density, of tickets and controls."""
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for seed in seeds:
        module = tickets(make, seed)
        found["ticket"].append(module.accuracies)
        found["new start"].append([control(make, masks, seed) for masks in module.masks])
        found["random mask"].append([control(make, at_random(masks, seed), seed) for masks in module.masks])
    table = Table("density", *KINDS, title=f"{name}: held-out accuracy, mean and range of {len(seeds)} seeds")
    for i, density in enumerate(densities()):
        table.add_row(f"{density:.1%}", *(_spread([one[i] for one in found[kind]]) for kind in KINDS))
    return table


def by_width(widths: Sequence[int], seeds: Sequence[int]) -> Table:
    """The sparsest tickets that keep the accuracy of the whole net, by width."""
    table = Table("width", "weights", "whole net", "sparsest within 0.01", "its weights", *map(_percent, densities()))
    for width in widths:
        runs = [tickets(lambda width=width: mlp(width), seed).accuracies for seed in seeds]  # type: ignore[misc]
        means = [mean(column) for column in zip(*runs, strict=True)]
        total = sum(p.numel() for p in mlp(width).parameters() if p.ndim > 1)
        kept = [accuracy >= means[0] - 0.01 for accuracy in means]
        last = kept.index(False) - 1 if False in kept else len(kept) - 1
        share = densities()[last]
        table.add_row(
            f"{width}",
            f"{total:,}",
            _spread([run[0] for run in runs]),
            _percent(share),
            f"{round(share * total):,}",
            *(f"{one:.3f}" for one in means),
        )
    return table


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    console = Console(width=160)
    for name, make in NETS.items():
        console.print(compared(name, make, range(options.seeds)))
    console.print(by_width(WIDTHS, range(options.seeds)))


if __name__ == "__main__":
    main()
