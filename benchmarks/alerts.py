"""What an alert is worth: how long before a failure it comes, what it misses, how often it is wrong; on one thread.

    python -m benchmarks.alerts

Runs that fail and runs that do not, each watched twice with the default rules: by a plain `RankMonitor()`, a sample
every 50 steps, and by one of every 10 that also has features. Beside them two rules on what is watched everywhere: the
norm of the gradient, and the loss, so many standard deviations above the mean of the last 128 steps. Whether and when a
run failed is judged from outside, by its loss or the spread of its features. The rules, and the larger number of
deviations, were chosen on seeds 0 to 6, which are not among these.
"""

import csv
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Muon
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from benchmarks.budget import digits
from benchmarks.overhead import quiet
from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import Monitor, RankCollapseAlert, RankMonitor
from lightning_lowrank.reports.alerts.ready_made import rank_alerts

STEPS, OFTEN = 1400, 10
# Steps in a row that make a failure, and of which a spike rule knows mean and deviation; how many deviations are a
# spike: as is usual, and the least at which no healthy run of the seeds that the rules were chosen on had one.
LASTING, WINDOW, SPIKE, QUIET_SPIKE = 10, 128, 6.0, 16.0

SOURCES = ("gradients", "weights", "updates", "features")
STATISTICS = ("stable_rank", "effective_rank", "participation_ratio")
OURS = (
    "weight_stable_rank_drop",
    "weight_effective_rank_drop",
    "gradient_stable_rank_below",
    "feature_participation_ratio_drop",
)
FLOOR = "floor"
text = cache(standard_library)  # which takes longer than some runs
Optimizer = Callable[..., torch.optim.Optimizer]


class Run(L.LightningModule):
    """A network in training at a learning rate that may grow; notes what is seen from outside."""

    def __init__(
        self, net: nn.Module, objective: "Objective", optimizer: Optimizer, rate: float, growth: float = 1.0
    ) -> None:
        super().__init__()
        self.net, self.objective, self.optimizer, self.rate, self.growth = net, objective, optimizer, rate, growth
        self.loss, self.norm, self.spread = list[float](), list[float](), list[float]()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Note the loss."""
        loss = self.objective(self, batch)
        self.loss.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the norm of the gradient."""
        self.norm.append(
            torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]).item()
        )

    def configure_optimizers(self) -> Any:
        """The rate is multiplied by the same at every step."""
        optimizer = self.optimizer(self.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.growth)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


Objective = Callable[[Run, list[Tensor]], Tensor]


def classes(run: Run, batch: list[Tensor]) -> Tensor:
    """Which digit it is."""
    return F.cross_entropy(run.net(batch[0]), batch[1])


def characters(run: Run, batch: list[Tensor]) -> Tensor:
    """Which character is next."""
    return F.cross_entropy(run.net(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())


def likeness(run: Run, batch: list[Tensor], *, stop: bool = True) -> Tensor:
    """Two noisy views of a digit are to have the same features (SimSiam); without stop-gradient all digits end up the
    same.

    Chen & He (2021), arXiv 2011.10566.
    """
    draw = torch.Generator().manual_seed(run.global_step)
    views = [batch[0] + 0.2 * torch.randn(batch[0].shape, generator=draw) for _ in range(2)]
    (a, p), (b, q) = (run.net(view) for view in views)
    run.spread.append(F.normalize(a.detach(), dim=-1).std(0).mean().item() * math.sqrt(a.shape[-1]))
    a, b = (a.detach(), b.detach()) if stop else (a, b)
    return -(F.cosine_similarity(p, b).mean() + F.cosine_similarity(q, a).mean()) / 2


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
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.reshape(-1, 1, 8, 8)).flatten(1))


def mlp(depth: int = 3, *, bias: bool = True) -> nn.Sequential:
    """Layers of 64."""
    hidden = [part for _ in range(depth - 1) for part in (nn.Linear(64, 64, bias=bias), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(64, 10, bias=bias))


def writer(norm: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The demo's transformer in small; with something else in place of its normalisation."""
    net = CharTransformer(100, depth=4, width=32, heads=2)
    for module in list(net.modules()) if norm else []:
        for name, child in module.named_children():
            setattr(module, name, norm() if norm and isinstance(child, nn.LayerNorm) else child)
    return net


@dataclass(frozen=True)
class Case:
    """Runs of one kind, and whether they are meant to fail."""

    what: str
    make: Callable[[], Run]
    seeds: Sequence[int]
    fails: bool = False


# A rate that grows does so tenfold in about nine hundred steps.
CASES = [
    Case(
        "transformer, not normalised, rate grows",
        lambda: Run(writer(nn.Identity), characters, AdamW, 1e-3, 1.0025),
        range(10, 13),
        True,
    ),
    Case("deep MLP, rate grows, units die", lambda: Run(mlp(8), classes, Adam, 1e-3, 1.0026), range(10, 13), True),
    Case(
        "SimSiam, no stop-gradient",
        lambda: Run(Twin(), partial(likeness, stop=False), AdamW, 1e-4),
        range(10, 13),
        True,
    ),
    Case("digits MLP", lambda: Run(mlp(), classes, AdamW, 1e-3), range(10, 20)),
    Case("conv net", lambda: Run(Convolutions(), classes, AdamW, 1e-3), range(10, 16)),
    Case("char transformer", lambda: Run(writer(), characters, AdamW, 1e-3), range(10, 14)),
    Case("deep MLP, rate as it was", lambda: Run(mlp(8), classes, Adam, 1e-3), range(10, 13)),
    Case("SimSiam with stop-gradient", lambda: Run(Twin(), likeness, AdamW, 1e-4), range(10, 13)),
]


@dataclass(frozen=True)
class Outcome:
    """Of a run: the step of its failure, the first alarm of each rule, and the share of its units that are dead at the
    end.
    """

    failure: int | None
    alarms: dict[str, int | None]
    dead: float


def failure(run: Run) -> int | None:
    """Judged from outside: the features are all but one, or half of what was learnt is lost; from the first of ten such
    steps in a row.
    """
    signs = [value < 0.2 for value in run.spread] if run.spread else list(_lost(run.loss))
    return next((i for i in range(len(signs) - LASTING + 1) if all(signs[i : i + LASTING])), None)


def _lost(losses: Sequence[float]) -> Iterator[bool]:
    best = losses[0]
    for i in range(len(losses)):
        recent = fmean(losses[max(0, i - LASTING + 1) : i + 1])
        yield not recent <= best + max(0.5, (losses[0] - best) / 2)
        best = min(best, recent)


def spike(values: Sequence[float], deviations: float) -> int | None:
    """First step at which a value is far above those before it, or no number."""
    curve = torch.tensor(values, dtype=torch.float64)
    before = curve.unfold(0, WINDOW, 1)[:-1]
    limit = before.mean(-1) + deviations * before.std(-1, correction=0)
    return next((WINDOW + i for i, usual in enumerate((curve[WINDOW:] <= limit).tolist()) if not usual), None)


def dead(layers: nn.Module) -> float:
    """Share of units, of layers one after the other, that are 0 for every digit."""
    units, x = [], digits().tensors[0]
    for layer in layers.children():
        x = layer(x).detach()
        units += [x.amax(0) <= 0] if isinstance(layer, nn.ReLU) else []
    return torch.cat(units).float().mean().item()


def first(monitor: Monitor, *rules: str) -> int | None:
    """Step of the first alarm of the rules that fit a glob."""
    firing = (event for event in monitor.events if event.state == "firing")
    return min((event.step for event in firing if any(fnmatchcase(event.rule, glob) for glob in rules)), default=None)


def train(run: Run, steps: int, *monitors: Monitor, logger: Any = False) -> None:
    """On digits, or on text."""
    data, size = (TensorDataset(text()), 8) if run.objective is characters else (digits(), 64)
    batches = DataLoader(data, size, sampler=RandomSampler(data, num_samples=steps * size))
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* alert: ")  # they are counted here
        L.Trainer(**silent, logger=logger, max_steps=steps, callbacks=list(monitors)).fit(run, batches)


def outcome(case: Case, seed: int) -> Outcome:
    """Of one training, under all rules."""
    quiet()
    L.seed_everything(seed, verbose=False)
    run, plain = case.make(), RankMonitor()
    rules = rank_alerts(f"{s.removesuffix('s')}_{statistic}" for s in SOURCES for statistic in STATISTICS)
    if isinstance(run.net, Twin):
        rules.append(RankCollapseAlert("feature", "participation_ratio", "net.encoder.6.out", floor=1.3, name=FLOOR))
    often = RankMonitor(SOURCES, STATISTICS, every_n_steps=OFTEN, name="often", alerts=rules)
    train(run, STEPS, plain, often)
    parameters, features = ("*weight*", "*gradient*"), "*_feature_*"
    alarms = {
        "every 50": first(plain, "*"),
        "every 10": first(often, *parameters),
        "and features": first(often, *parameters, features),
    }
    alarms |= {FLOOR: first(often, FLOOR)} if isinstance(run.net, Twin) else {}
    alarms |= {
        f"{rule}, {every}": first(monitor, f"*{rule}")
        for rule in OURS
        for every, monitor in ((50, plain), (OFTEN, often))
    }
    for name, values in (("gradient norm", run.norm), ("loss", run.loss)):
        alarms |= {f"{name} {deviations:g}": spike(values, deviations) for deviations in (SPIKE, QUIET_SPIKE)}
    return Outcome(failure(run), alarms, dead(run.net) if isinstance(run.net, nn.Sequential) else math.nan)


def said(case: Case, outcomes: Sequence[Outcome], rule: str) -> str:
    """Of runs that fail the lead of each alarm in steps, of healthy ones how many were alarmed."""
    if rule not in outcomes[0].alarms:
        return ""
    if not case.fails:
        return f"{sum(o.alarms[rule] is not None for o in outcomes)} false"
    return ", ".join(
        "missed" if o.failure is None or (at := o.alarms[rule]) is None else f"{o.failure - at:+d}" for o in outcomes
    )


def levels(optimizer: Optimizer, rate: float) -> Iterator[str]:
    """Median effective ranks of a healthy MLP, as shares of those of Gaussian matrices: the first ten samples and the
    last ten.
    """
    L.seed_everything(10, verbose=False)
    monitor = RankMonitor(statistics="relative_effective_rank", every_n_steps=10)
    with TemporaryDirectory() as folder:
        train(
            Run(mlp(4, bias=False), classes, optimizer, rate),
            1000,
            monitor,
            logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        )
        (file,) = Path(folder).rglob("metrics.csv")
        rows = list(csv.DictReader(file.open()))
    for source in ("gradient", "update", "weight"):
        curve = [float(row[key]) for row in rows if row.get(key := f"rank/{source}_relative_effective_rank_median")]
        yield f"{median(curve[:10]):.2f} to {median(curve[-10:]):.2f}"


def table_of(title: str, *headings: str) -> Table:
    """Words to the left, figures to the right."""
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    return table


def main() -> None:
    """Print the tables."""
    quiet()
    spikes = [f"{name} {deviations:g}" for name in ("gradient norm", "loss") for deviations in (SPIKE, QUIET_SPIKE)]
    rules = ["every 50", "every 10", "and features", FLOOR, *spikes]
    whole = table_of(
        f"Steps from alarm to failure, in {STEPS} (negative: it came after)", "runs", "number", "failed at step", *rules
    )
    single = table_of("The same of each rule", "runs", "every", *OURS)
    deaths = table_of("Units that are 0 for every digit at the end", "runs", "%")
    for case in CASES:
        outcomes = [outcome(case, seed) for seed in case.seeds]
        failures = [o.failure for o in outcomes]
        failed = ", ".join(map(str, failures)) if case.fails or any(failures) else "never"
        whole.add_row(case.what, str(len(outcomes)), failed, *(said(case, outcomes, rule) for rule in rules))
        for every in (50, OFTEN) if case.fails else ():
            single.add_row(case.what, str(every), *(said(case, outcomes, f"{rule}, {every}") for rule in OURS))
        if "deep" in case.what:
            deaths.add_row(case.what, ", ".join(f"{100 * o.dead:.0f}" for o in outcomes))
    ranks = table_of(
        "Median effective rank of a digits MLP, of a Gaussian matrix 1", "optimizer", "gradients", "updates", "weights"
    )
    for name, optimizer, rate in (("AdamW", AdamW, 1e-3), ("SGD", SGD, 0.1), ("Muon", Muon, 0.02)):
        ranks.add_row(name, *levels(optimizer, rate))
    for table in (whole, single, deaths, ranks):
        Console(width=220).print(table)


if __name__ == "__main__":
    auto_cli(main)
