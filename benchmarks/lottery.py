"""What tickets of `LotteryTicket` learn beside the same masks from other starts and beside random masks, on digits.

python -m benchmarks.lottery --only nets       # MLP and convolutional net, 10 densities, three seeds
python -m benchmarks.lottery --only widths     # MLPs of three widths
python -m benchmarks.lottery --only units      # whole neurons and channels; what is left of them, smaller and faster
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, median
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.factorize import texts, transformer
from lightning_lowrank import LotteryTicket

ROUNDS, PRUNE, EPOCHS, BATCH = 10, 0.31, 15, 64
WIDTHS = (75, 300, 1200)
# Rounds of nets of several widths: the widest goes on longer.
LONGER = 14
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


def normed() -> nn.Module:
    """Four convolutions with batch norms, and a linear layer."""
    channels = (1, 32, 32, 64, 64)
    layers = [
        layer
        for i in range(4)
        for layer in (
            nn.Conv2d(channels[i], channels[i + 1], 3, padding=1, stride=2 if i == 2 else 1),
            nn.BatchNorm2d(channels[i + 1]),
            nn.ReLU(),
        )
    ]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


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


def tickets(make: Callable[[], nn.Module], seed: int, rounds: int = ROUNDS, **options: Any) -> Digits:
    """Accuracies and masks at the end of each round."""
    train, held = digits()
    torch.manual_seed(seed)
    module = Digits(make())
    trainer = L.Trainer(
        max_epochs=rounds * EPOCHS,
        check_val_every_n_epoch=EPOCHS,
        num_sanity_val_steps=0,
        callbacks=[LotteryTicket(rounds, EPOCHS, PRUNE, every_n_steps=10**6, **options)],
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
    net.eval()
    return (net(held).argmax(1) == labels).double().mean().item()


def at_random(masks: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Masks of the same number of weights in all, wherever they fall."""
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    shuffled = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))]
    parts = shuffled.split([mask.numel() for mask in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def units_at_random(masks: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Masks of the same number of units in each layer."""
    draw = torch.Generator().manual_seed(seed)
    return {name: mask[:, torch.randperm(mask.shape[1], generator=draw)] for name, mask in masks.items()}


def densities(num: int = ROUNDS) -> list[float]:
    """Of each round."""
    return [(1 - PRUNE) ** i for i in range(num)]


def compared(
    name: str,
    make: Callable[[], nn.Module],
    seeds: Sequence[int],
    shuffled: Callable[[dict[str, Tensor], int], dict[str, Tensor]] = at_random,
    **options: Any,
) -> Table:
    """Accuracy by density, of tickets and controls."""
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for seed in seeds:
        module = tickets(make, seed, **options)
        found["ticket"].append(module.accuracies)
        found["new start"].append([control(make, masks, seed) for masks in module.masks])
        found["random mask"].append([control(make, shuffled(masks, seed), seed) for masks in module.masks])
    table = Table("density", *KINDS, title=f"{name}: held-out accuracy, mean and range of {len(seeds)} seeds")
    for i, density in enumerate(densities()):
        table.add_row(f"{density:.1%}", *(_spread([one[i] for one in found[kind]]) for kind in KINDS))
    return table


def by_width(widths: Sequence[int], seeds: Sequence[int]) -> Table:
    """The sparsest tickets that keep the accuracy of the whole net, by width."""
    shares = densities(LONGER)
    table = Table("width", "weights", "whole net", "sparsest within 0.01", "its weights", *map(_percent, shares))
    for width in widths:
        runs = [tickets(partial(mlp, width), seed, LONGER).accuracies for seed in seeds]
        means = [mean(column) for column in zip(*runs, strict=True)]
        total = sum(p.numel() for p in mlp(width).parameters() if p.ndim > 1)
        kept = [accuracy >= means[0] - 0.01 for accuracy in means]
        last = kept.index(False) - 1 if False in kept else len(kept) - 1
        table.add_row(
            f"{width}",
            f"{total:,}",
            _spread([run[0] for run in runs]),
            _percent(shares[last]),
            f"{round(shares[last] * total):,}",
            *(f"{one:.3f}" for one in means),
        )
    return table


def smaller() -> Table:
    """What is left of nets after five rounds, 23 % of the units, and of a transformer after two, half of them."""
    headings = ("numbers", "multiply-adds", "forward, ms", "step, ms", "largest difference")
    table = Table("net", *headings, title="Whole -> exported; batches of 256 digits, of 32 x 64 characters; one thread")
    (x, _), _ = (dataset.tensors for dataset in digits())
    for name, make in {"MLP 300-100": lambda: mlp(300), "convolutional, batch norms": normed}.items():
        net = tickets(make, 0, 5, units="neuron").net.eval()
        table.add_row(name, *_saved(net, x[:256]))
    data, held = texts()
    torch.manual_seed(0)
    module = transformer()
    method = LotteryTicket(2, prune=0.5, steps_per_round=50, units=("neuron", "head"), every_n_steps=10**6)
    silent: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(max_steps=100, callbacks=[method], enable_progress_bar=False, accelerator="cpu", **silent)
    trainer.fit(module, DataLoader(data, 32, shuffle=True, drop_last=True))
    table.add_row("char transformer, heads too", *_saved(module.eval(), held[:32, :-1]))
    return table


def _saved(net: nn.Module, inputs: Tensor) -> list[str]:
    small = LotteryTicket.export(net, inputs)
    with torch.no_grad():
        difference = float((net(inputs) - small(inputs)).abs().max() / net(inputs).abs().max())
    pairs = [(_size(one), _multiply_adds(one, inputs), *_times(one, inputs)) for one in (net, small)]
    told = [
        f"{before:,} -> {after:,} ({before / after:.1f} times)"
        if i < 2
        else f"{before:.2f} -> {after:.2f} ({before / after:.1f} times)"
        for i, (before, after) in enumerate(zip(*pairs, strict=True))
    ]
    return [*told, f"{difference:.0e}"]


def _size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _multiply_adds(net: nn.Module, inputs: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(inputs)
    return counter.get_total_flops() // 2


def _times(net: nn.Module, inputs: Tensor, times: int = 30) -> tuple[float, float]:
    """Processor time of a forward pass, and of one with a backward pass, in ms."""
    found = []
    forward = partial(net, inputs)
    both: tuple[Callable[[], object], ...] = (forward, lambda: forward().square().mean().backward())
    for passes in both:
        taken = []
        for _ in range(times):
            begun = time.process_time()
            passes()
            taken.append(1000 * (time.process_time() - begun))
        found.append(median(taken))
    return found[0], found[1]


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("nets", "widths", "units"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    console = Console(width=160)
    seeds = range(options.seeds)
    if options.only in (None, "nets"):
        for name, make in NETS.items():
            console.print(compared(name, make, seeds))
    if options.only in (None, "widths"):
        console.print(by_width(WIDTHS, seeds))
    if options.only in (None, "units"):
        for name, make in {"MLP 300-100": lambda: mlp(300), "convolutional, batch norms": normed}.items():
            console.print(compared(f"{name}, whole units", make, seeds, units_at_random, units="neuron"))
        console.print(smaller())


if __name__ == "__main__":
    main()
