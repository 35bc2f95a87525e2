"""What an alert is worth: how long before a failure it comes, what it misses, how often it is wrong; on one thread.

    python -m benchmarks.alerts

Nine runs that fail and twenty-three that do not, each with the default rules of `RankMonitor`, and with two rules on what is watched
everywhere: a norm of the gradient, or a loss, that is six standard deviations above the mean of the last 64 steps. Whether and when a run
failed is judged from outside, by its loss, its accuracy or the spread of its features. The default rules were chosen on seeds 0 to 6, which
are not among these.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from benchmarks.budget import digits
from benchmarks.overhead import quiet
from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import RankMonitor

STEPS, EVERY = 300, 5
# Steps in a row that make a failure, and of which a spike rule knows mean and deviation; how many deviations are a spike.
LASTING, WINDOW, SPIKE = 10, 64, 6.0

RULES = ("ranks", "gradient norm", "loss")
SOURCES = ("gradients", "weights", "updates", "features", "centred_features")


class Run(L.LightningModule):
    """A network in training at a learning rate that may grow; notes what is seen from outside."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., torch.optim.Optimizer], rate: float, growth: float = 1.0) -> None:
        super().__init__()
        self.net, self.optimizer, self.rate, self.growth = net, optimizer, rate, growth
        self.loss, self.norm, self.accuracy, self.spread = list[float](), list[float](), list[float](), list[float]()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the norm of the gradient."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.norm.append(torch.nn.utils.get_total_norm(grads).item())

    def configure_optimizers(self) -> Any:
        """The rate is multiplied by the same at every step."""
        optimizer = self.optimizer(self.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.growth)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Classified(Run):
    """Tells digits apart."""

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels)
        self.loss.append(loss.item())
        self.accuracy.append((logits.argmax(-1) == labels).float().mean().item())
        return loss


class Written(Run):
    """Predicts the next character."""

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy."""
        (text,) = batch
        loss = F.cross_entropy(self.net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        self.loss.append(loss.item())
        return loss


class Siamese(Run):
    """Two noisy views of a digit are to have the same features (SimSiam); without stop-gradient they all end up the same.

    Chen & He (2021), arXiv 2011.10566.
    """

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Negative cosine."""
        draw = torch.Generator().manual_seed(self.global_step)
        views = [batch[0] + 0.2 * torch.randn(batch[0].shape, generator=draw) for _ in range(2)]
        (a, p), (b, q) = (self.net(view) for view in views)
        loss = -(F.cosine_similarity(p, b).mean() + F.cosine_similarity(q, a).mean()) / 2
        self.loss.append(loss.item())
        self.spread.append(F.normalize(a.detach(), dim=-1).std(0).mean().item() * math.sqrt(a.shape[-1]))
        return loss


class Twin(nn.Module):
    """Features, and what is predicted from them."""

    def __init__(self) -> None:
        super().__init__()
        hidden = (nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.encoder = nn.Sequential(*hidden, nn.Linear(64, 32))
        self.predictor = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        return z, self.predictor(z)


class Convolutions(nn.Module):
    """Two of them and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.reshape(-1, 1, 8, 8)).flatten(1))


def mlp(depth: int = 3) -> nn.Module:
    """Layers of 64."""
    hidden = [part for _ in range(depth - 1) for part in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def writer(*, normalised: bool = True) -> nn.Module:
    """The demo's transformer in small, with or without its normalisation."""
    net = CharTransformer(100, depth=4, width=32, heads=2)
    for module in [] if normalised else list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.Identity())
    return net


def diverging() -> Run:
    """No normalisation, and a learning rate that grows tenfold in 130 steps."""
    return Written(writer(normalised=False), torch.optim.AdamW, 1e-3, 1.018)


def collapsing() -> Run:
    """No stop-gradient."""
    return Siamese(Twin(), torch.optim.AdamW, 5e-4)


def dying() -> Run:
    """A deep network whose learning rate grows until its units are dead."""
    return Classified(mlp(8), torch.optim.Adam, 1e-3, 1.015)


def well_read() -> Run:
    """Healthy."""
    return Written(writer(), torch.optim.AdamW, 1e-3)


def well_seen() -> Run:
    """Healthy."""
    return Classified(Convolutions(), torch.optim.AdamW, 1e-3)


def well_told() -> Run:
    """Healthy."""
    return Classified(mlp(), torch.optim.AdamW, 1e-3)


def well_deep() -> Run:
    """Healthy: the network whose units die, without what kills them."""
    return Classified(mlp(8), torch.optim.Adam, 1e-3)


@dataclass(frozen=True)
class Case:
    """Runs of one kind.

    Attributes:
        fails: Whether it is meant to.
    """

    what: str
    make: Callable[[], Run]
    seeds: Sequence[int]
    fails: bool


CASES = [
    Case("transformer, no normalisation, rate grows", diverging, range(10, 13), True),
    Case("SimSiam, no stop-gradient", collapsing, range(10, 13), True),
    Case("deep MLP, units die", dying, range(10, 13), True),
    Case("digits MLP", well_told, range(10, 17), False),
    Case("conv net", well_seen, range(10, 17), False),
    Case("char transformer", well_read, range(10, 16), False),
    Case("deep MLP, rate as it was", well_deep, range(10, 13), False),
]


@dataclass(frozen=True)
class Outcome:
    """Steps: of the failure, of the first alarm of each rule; None where there was none."""

    failure: int | None
    alarms: dict[str, int | None] = field(default_factory=dict)


def lasting(signs: Sequence[bool]) -> int | None:
    """First step from which a sign is there for long enough."""
    return next((i for i in range(len(signs) - LASTING + 1) if all(signs[i : i + LASTING])), None)


def failure(run: Run) -> int | None:
    """Judged from outside: the loss is no number or twice the least so far, a third of digits was known and is not, features are one."""
    best, worse = math.inf, []
    for i in range(len(run.loss)):
        recent = fmean(run.loss[max(0, i - LASTING) : i + 1])
        worse.append(not isinstance(run, Siamese) and not recent <= 2 * best + 0.1)
        best = min(best, recent)
    known = [max([0.0, *run.accuracy[: i + 1]]) > 0.3 for i in range(len(run.accuracy))]
    chance = [was and value < 0.2 for was, value in zip(known, run.accuracy, strict=True)]
    found = [lasting(worse), lasting(chance), lasting([value < 0.2 for value in run.spread])]
    return min((step for step in found if step is not None), default=None)


def spike(values: Sequence[float]) -> int | None:
    """First step at which a value is far above those before it, or no number."""
    for i, value in enumerate(values[WINDOW:], WINDOW):
        before = values[i - WINDOW : i]
        if not value <= fmean(before) + SPIKE * pstdev(before):
            return i
    return None


def outcome(case: Case, seed: int) -> Outcome:
    """Of one training, under all rules."""
    quiet()
    L.seed_everything(seed, verbose=False)
    run = case.make()
    data, size = (TensorDataset(standard_library()), 8) if isinstance(run, Written) else (digits(), 64)
    batches = DataLoader(data, size, sampler=RandomSampler(data, num_samples=STEPS * size))
    monitor = RankMonitor(SOURCES, every_n_steps=EVERY)
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* alert: ")  # they are counted here
        L.Trainer(**silent, max_steps=STEPS, callbacks=[monitor]).fit(run, batches)
    ours = min((event.step for event in monitor.events if event.state == "firing"), default=None)
    return Outcome(failure(run), {"ranks": ours, "gradient norm": spike(run.norm), "loss": spike(run.loss)})


def said(case: Case, outcomes: Sequence[Outcome], rule: str) -> str:
    """Of runs that fail the lead of each alarm in steps, of healthy ones how many were alarmed."""
    alarms = [outcome.alarms[rule] for outcome in outcomes]
    if not case.fails:
        return f"{sum(alarm is not None for alarm in alarms)} false"
    pairs = [(outcome.failure, alarm) for outcome, alarm in zip(outcomes, alarms, strict=True)]
    return ", ".join("missed" if failed is None or alarm is None else f"{failed - alarm:+d}" for failed, alarm in pairs)


def main() -> None:
    """Print the table."""
    table = Table(title=f"Steps from alarm to failure (negative: it came after), {STEPS} steps, a sample every {EVERY}")
    for heading in ("runs", "number", "failed at step", *RULES):
        table.add_column(heading, justify="left" if heading == "runs" else "right")
    for case in CASES:
        outcomes = [outcome(case, seed) for seed in case.seeds]
        failures = [o.failure for o in outcomes]
        failed = ", ".join("-" if f is None else str(f) for f in failures) if case.fails else "-" if not any(failures) else str(failures)
        table.add_row(case.what, str(len(outcomes)), failed, *(said(case, outcomes, rule) for rule in RULES))
    Console(width=130).print(table)


if __name__ == "__main__":
    auto_cli(main)
