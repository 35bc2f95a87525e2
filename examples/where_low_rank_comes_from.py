"""Weight decay, dropout and depth on real nets: ranks of weights at equal training loss, beside what theory says.

    python examples/where_low_rank_comes_from.py
    python examples/where_low_rank_comes_from.py --only=digits

A convolutional net learns handwritten digits, and a transformer characters of Python, by plain SGD, whose decay is part
of the loss as the theory asks. Theory speaks of linear nets and of regression (docs/theory.md): that decay of k factors
is the Schatten 2/k quasi-norm of their product; that directions older than 1 / (rate x decay) steps are forgotten; that
dropout is an L2 penalty weighted by the data. Each is held against what the nets do.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any, Literal

import lightning as L
import rich
import torch
from jsonargparse import auto_cli
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.char_transformer import Block, frequent_characters, source_code
from lightning_lowrank import svd
from lightning_lowrank.statistics import effective_rank, stable_rank

SEEDS = 3
WIDTH, CONTEXT = 32, 32
SMALL = 0.01  # singular values below this part of the largest are counted as gone
Task = Literal["digits", "text"]


@dataclass(frozen=True)
class Arm:
    """What is done to the net.

    Attributes:
        decay: Coefficient of half the sum of squares of all weights.
        dropout: Probability to drop, before every hidden layer and the head.
        at_head: The same, of the head's inputs alone.
        penalty: The penalty in place of the dropout at the head.
        factors: How many matrices stand in the place of each hidden matrix.
        layers: Times as many hidden layers.
    """

    decay: float = 0.0
    dropout: float = 0.0
    at_head: float = 0.0
    penalty: bool = False
    factors: int = 1
    layers: int = 1


def arms(decay: float) -> dict[str, Arm]:
    """All, by name."""
    return {
        "plain": Arm(),
        f"decay {decay:g}": Arm(decay),
        f"decay {3 * decay:g}": Arm(3 * decay),
        "dropout 0.2": Arm(dropout=0.2),
        "dropout 0.5": Arm(dropout=0.5),
        "dropout 0.5 at the head": Arm(at_head=0.5),
        "its weighted L2": Arm(at_head=0.5, penalty=True),
        "2 factors": Arm(factors=2),
        f"2 factors, decay {decay:g}": Arm(decay, factors=2),
        f"3 factors, decay {decay:g}": Arm(decay, factors=3),
        "2 x layers": Arm(layers=2),
        f"2 x layers, decay {decay:g}": Arm(decay, layers=2),
    }


class Product(nn.Module):
    """A linear layer, or factors of its matrix that multiply to it: balanced ones."""

    def __init__(self, inputs: int, outputs: int, factors: int) -> None:
        super().__init__()
        layer = nn.Linear(inputs, outputs)
        self.bias = layer.bias
        left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        power = torch.diag(values ** (1 / factors))
        split = [power @ right, *[power] * (factors - 2), left @ power]
        self.factors = nn.ParameterList([layer.weight] if factors == 1 else [one.clone() for one in split])

    def forward(self, x: Tensor) -> Tensor:
        for factor in list(self.factors)[:-1]:
            x = F.linear(x, factor)
        return F.linear(x, self.factors[-1], self.bias)

    @property
    def matrix(self) -> Tensor:
        """What they multiply to."""
        found = self.factors[0]
        for factor in list(self.factors)[1:]:
            found = factor @ found
        return found.detach()

    @property
    def gap(self) -> float:
        """Mean sum of squares of the factors, over the least that factors of this product can have, less one."""
        squares = fmean(float(factor.square().sum()) for factor in self.factors)
        return squares / float(svd(self.matrix).magnitudes.pow(2 / len(self.factors)).sum()) - 1


class Learner(L.LightningModule):
    """A body and a head.

    Args:
        body: Up to the head's inputs.
        head: A linear layer.
        arm: What is done.
        rate: Of SGD.
    """

    def __init__(self, body: nn.Module, head: nn.Linear, arm: Arm, rate: float) -> None:
        super().__init__()
        self.body, self.head, self.arm, self.rate = body, head, arm, rate
        self.drop = nn.Dropout(0.0 if arm.penalty else max(arm.dropout, arm.at_head))

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Cross-entropy, in nats."""
        return F.cross_entropy(self.head(self.drop(self.body(batch[0]))).flatten(0, -2), batch[1].flatten())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if not self.arm.penalty:
            return self.loss(batch)
        features = self.body(batch[0]).flatten(0, -2)
        logits = self.head(features)
        return F.cross_entropy(logits, batch[1].flatten()) + weighted_l2(
            features, logits, self.head.weight, self.arm.at_head
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, weight_decay=self.arm.decay)

    @property
    def hidden(self) -> list[Product]:
        """The matrices that are looked at."""
        return [layer for layer in self.modules() if isinstance(layer, Product)]


def weighted_l2(features: Tensor, logits: Tensor, weight: Tensor, drop: float) -> Tensor:
    """What dropping inputs of a softmax layer adds to the loss, to second order: each squared weight counts by the
    square of its input and the curvature of the loss.
    """
    chances = logits.softmax(-1)
    curvature = chances @ weight.square() - (chances @ weight).square()  # of the loss along each input's column
    return drop / (2 * (1 - drop)) * (features.square() * curvature).sum(-1).mean()


def conv_net(arm: Arm) -> tuple[nn.Module, nn.Linear]:
    """Two convolutions, then hidden layers of 64."""
    wide = [256, *[64] * (2 * arm.layers)]
    hidden = [
        layer
        for inputs, outputs in pairwise(wide)
        for layer in (nn.Dropout(arm.dropout), Product(inputs, outputs, arm.factors), nn.ReLU())
    ]
    convolutions = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, stride=2), nn.ReLU()
    )
    return nn.Sequential(nn.Unflatten(1, (1, 8)), convolutions, nn.Flatten(), *hidden), nn.Linear(64, 10)


class Stream(nn.Module):
    """A transformer up to its head."""

    def __init__(self, arm: Arm, vocabulary: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(_block(arm) for _ in range(2 * arm.layers)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions(torch.arange(text.shape[1]))
        return self.norm(self.blocks(x))


def _block(arm: Arm) -> Block:
    block = Block(WIDTH, heads=2)
    block.register_module("qkv", Product(WIDTH, 3 * WIDTH, arm.factors))
    block.register_module("out", nn.Sequential(Product(WIDTH, WIDTH, arm.factors), nn.Dropout(arm.dropout)))
    up, down = Product(WIDTH, 4 * WIDTH, arm.factors), Product(4 * WIDTH, WIDTH, arm.factors)
    block.mlp = nn.Sequential(up, nn.GELU(), nn.Dropout(arm.dropout), down, nn.Dropout(arm.dropout))
    return block


@cache
def digits() -> tuple[TensorDataset, TensorDataset]:
    """Two thirds, and a third."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    first, second = order[:1200], order[1200:]
    return TensorDataset(x[first], y[first]), TensorDataset(x[second], y[second])


@cache
def text() -> tuple[TensorDataset, TensorDataset]:
    """Windows of characters and the characters that follow."""
    index = frequent_characters()
    tokens = torch.tensor([index[one] for one in source_code()[:1_000_000] if one in index])
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    pairs = windows[:, :-1], windows[:, 1:]
    return TensorDataset(*(one[256:] for one in pairs)), TensorDataset(*(one[:256] for one in pairs))


@dataclass(frozen=True)
class Setting:
    """How a task is learnt.

    Attributes:
        make: Body and head.
        data: To learn from, and held out.
        rate: Of SGD.
        decay: The weaker one.
        batch: Examples.
        rows: Of a batch, as a linear layer sees them: what the rank of its gradient is at most.
        loss: The training loss at which ranks are compared.
        steps: Where all end.
    """

    make: Callable[[Arm], tuple[nn.Module, nn.Linear]]
    data: Callable[[], tuple[TensorDataset, TensorDataset]]
    rate: float
    decay: float
    batch: int
    rows: int
    loss: float
    steps: int


SETTINGS: dict[Task, Setting] = {
    "digits": Setting(conv_net, digits, 0.1, 3e-3, 32, 32, 0.1, 2000),
    "text": Setting(
        lambda arm: (Stream(arm, 100), nn.Linear(WIDTH, 100)), text, 0.5, 7e-4, 16, 16 * CONTEXT, 2.5, 1000
    ),
}


class AtLoss(L.Callback):
    """Keeps the net as it was when the training loss, without dropout, first fell to a value."""

    def __init__(self, examples: Sequence[Tensor], value: float, every: int = 20) -> None:
        self._examples, self._value, self._every = examples, value, every
        self.step: int | None = None
        self.kept: Learner | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Look now and then."""
        if self.kept is None and trainer.global_step % self._every == 0:
            module: Any = pl_module
            if _loss(module, self._examples) <= self._value:
                self.step, self.kept = trainer.global_step, _copy(module)


def _copy(module: Learner) -> Learner:
    """Without what belongs to the trainer."""
    copied = Learner(copy.deepcopy(module.body), copy.deepcopy(module.head), module.arm, module.rate)
    return copied.eval()


@torch.no_grad()
def _loss(module: Learner, examples: Sequence[Tensor]) -> float:
    module.eval()
    found = float(module.loss(examples))
    module.train()
    return found


def learnt(setting: Setting, arm: Arm, seed: int) -> dict[str, float]:
    """What is said of one training: where the loss was the same, and at the end."""
    L.seed_everything(seed, verbose=False)
    module = Learner(*setting.make(arm), arm, setting.rate)
    train, test = setting.data()
    at_loss = AtLoss([tensor[:256] for tensor in train.tensors], setting.loss)
    silent: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(
        max_steps=setting.steps,
        max_epochs=-1,
        callbacks=[at_loss],
        enable_progress_bar=False,
        accelerator="cpu",
        **silent,
    )
    start = ranks(module)
    trainer.fit(module, DataLoader(train, setting.batch, shuffle=True, drop_last=True))
    found = {f"start, {name}": value for name, value in start.items()} | {"steps": float(at_loss.step or math.nan)}
    for when, one in (("equal", at_loss.kept), ("end", module)):
        of = dict.fromkeys(start, math.nan) | {"held out": math.nan} if one is None else ranks(one)
        found |= {f"{when}, {name}": value for name, value in of.items()}
        found[f"{when}, held out"] = math.nan if one is None else _loss(one, test.tensors)
    return found | {"dropout": of_dropout(at_loss.kept or module, [tensor[:256] for tensor in train.tensors])}


def ranks(module: Learner) -> dict[str, float]:
    """Medians over hidden matrices; the largest gap of factors; the kernel of the last convolution."""
    kernels = [layer.weight.flatten(1).double() for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    spectra = [svd(layer.matrix.double()) for layer in module.hidden]
    alive = [int((s.magnitudes > SMALL * s.magnitudes[0]).sum()) / len(s.magnitudes) for s in spectra]
    return {
        "stable rank": _median([float(stable_rank(s)) for s in spectra]),
        "effective rank": _median([float(effective_rank(s)) for s in spectra]),
        "alive": fmean(alive),
        "gap": max(layer.gap for layer in module.hidden),
        "kernel": float(stable_rank(svd(kernels[-1].detach()))) if kernels else math.nan,
    }


@torch.no_grad()
def of_dropout(module: Learner, examples: Sequence[Tensor], masks: int = 64, drop: float = 0.2) -> float:
    """What dropping the head's inputs adds to the loss, over the weighted L2 penalty."""
    module.eval()
    features = module.body(examples[0]).flatten(0, -2)
    labels, logits = examples[1].flatten(), module.head(features)
    plain = F.cross_entropy(logits, labels)
    dropped = [F.cross_entropy(module.head(F.dropout(features, drop)), labels) for _ in range(masks)]
    return float((torch.stack(dropped).mean() - plain) / weighted_l2(features, logits, module.head.weight, drop))


def forgotten(setting: Setting, arm: Arm) -> str:
    """Directions that Weyl's inequality leaves above a part of the largest, for a largest that stays."""
    if not arm.decay:
        return ""
    steps = math.ceil(math.log(1 / SMALL) / -math.log1p(-setting.rate * arm.decay))
    return f"{setting.rows * steps:,}"


COLUMNS = (
    *("equal, stable rank", "equal, effective rank", "equal, kernel", "equal, held out"),
    *("end, stable rank", "end, effective rank", "end, kernel", "end, alive", "end, held out", "end, gap", "dropout"),
)


def compared(task: Task, share: float, seeds: int) -> Table:
    """All arms of a task."""
    setting = SETTINGS[task]
    setting = replace(setting, steps=max(20, round(share * setting.steps)))
    title = f"{task}: at a training loss of {setting.loss:g}, and after {setting.steps} steps; {seeds} seeds"
    table = Table(title=title)
    for heading in ("", "steps", *COLUMNS, "Weyl: at most"):
        table.add_column(heading, overflow="fold")
    for name, row, arm in _rows(setting, seeds):
        if name == "plain":
            start = [
                fmean(run[f"start, {column}"] for run in row) for column in ("stable rank", "effective rank", "kernel")
            ]
            table.add_row("at the start", "0", *(f"{value:.1f}" for value in start))
        cells = [_told([run[column] for run in row]) for column in COLUMNS]
        reached = [run["steps"] for run in row if not math.isnan(run["steps"])]
        took = f"{fmean(reached):.0f}" if len(reached) == len(row) else f"{len(reached)} of {len(row)} came there"
        table.add_row(name, took, *cells, forgotten(setting, arm))
    return table


def _rows(setting: Setting, seeds: int) -> Iterator[tuple[str, list[dict[str, float]], Arm]]:
    for name, arm in arms(setting.decay).items():
        yield name, [learnt(setting, arm, seed) for seed in range(seeds)], arm


def _told(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    spread = f" ± {stdev(known):.2g}" if len(known) > 1 else ""
    return f"{fmean(known):.3g}{spread}" if known else "-"


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values).quantile(0.5))


def main(only: Task | None = None, share: float = 1.0, seeds: int = SEEDS) -> None:
    """Both tasks, one after the other.

    Args:
        only: One of them.
        share: Of the steps.
        seeds: How many.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches")
    torch.set_num_threads(1)
    rich.reconfigure(width=max(200, rich.get_console().width))
    for task in SETTINGS:
        if only in (None, task):
            rich.print(compared(task, share, seeds))


if __name__ == "__main__":
    auto_cli(main)
