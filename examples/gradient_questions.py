"""Four questions that the anatomy of gradients leaves open, each put to five seeds.

    python examples/gradient_questions.py
    python examples/gradient_questions.py --only=transition

Sonthalia, Murray and Montufar (2025), arXiv 2510.01303, speak of the gradient at the start, by W that does not depend
on the data. Here: does the spike's term overtake the residue's during training; do the terms say anything of the
held-out loss; what is left for a spike of nu >= 1/2 where the expected derivative of the activation vanishes; does the
bound of the error hold once W has seen the data. Handwritten digits and MiniLM's embeddings of docstrings stand in for
the paper's MNIST and CIFAR embeddings.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

import lightning as L
import rich
import torch
from jsonargparse import auto_cli
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.edge_of_stability import Curves
from examples.gradient_anatomy import TERMS, Classifier, Problem, digits, directions, norms, problem, sentences, terms
from lightning_lowrank import GradientAnatomyMonitor, svd
from lightning_lowrank.monitors.concentration.inequality import rank_persistence

SEEDS = 5
FRACTIONS = (1.0, 0.5, 0.1, 0.01)
SPIKES = (0.25, 0.3125, 0.375, 0.4375, 0.5)
SHARES = ("residue", "interpolant", "spike", "bulk")
Part = Literal["transition", "held_out", "held_out_real", "vanishing", "dependent"]
# By the name of the setting, one row for each seed: shares, and the loss they are held against.
Findings = Mapping[str, Sequence[Mapping[str, float]]]


def trained(of: Problem, fractions: Sequence[float] = FRACTIONS, most: int = 1000) -> list[Problem]:
    """Gradient descent on W, at a rate at which it is stable; what there is where the loss has fallen to each fraction
    of what it was, or at the last step.
    """
    rate = 0.5 * len(of.targets) / (len(of.a) * (of.gamma * float(svd(of.data.inputs).top)) ** 2)
    start, found = loss(of), list[Problem]()
    for _ in range(most):
        while len(found) < len(fractions) and loss(of) <= fractions[len(found)] * start:
            found.append(of)
        if len(found) == len(fractions):
            break
        of = replace(of, W=of.W - rate * of.gradient())
    return found + [of] * (len(fractions) - len(found))


def loss(of: Problem) -> float:
    """Mean of half the squared errors."""
    return 0.5 * float(of.residual.square().mean())


def transition(n: int) -> Table:
    """Whether the spike's term overtakes the residue's while the loss falls."""
    title = "Spike over residue, S2 / S1: geometric mean (range) of five seeds"
    columns = [f"loss x {fraction:g}" for fraction in FRACTIONS]
    table = _table(title, "activation", "nu", *columns, "S2 above S1 at start, end", "v1.q at start, end", "S12 / S1")
    for act in ("softplus", "GELU", "tanh", "ReLU"):
        for nu in SPIKES:
            runs = [trained(problem(n, act, nu=nu, seed=seed)) for seed in range(SEEDS)]
            sizes = [[norms(of) for of in run] for run in runs]
            ratios = [[one["S2"] / one["S1"] for one in run] for run in sizes]
            above = [sum(row[i] > 1 for row in ratios) for i in (0, -1)]
            along = [fmean(directions(run[i])["v1.q"] for run in runs) for i in (0, -1)]
            between = [_geometric([run[i]["S12"] / run[i]["S1"] for run in sizes]) for i in (0, -1)]
            table.add_row(
                act,
                f"{nu:g}",
                *(_spread(column) for column in zip(*ratios, strict=True)),
                f"{above[0]}, {above[1]} of {SEEDS}",
                f"{along[0]:.2f}, {along[1]:.2f}",
                f"{between[0]:.2g}, {between[1]:.2g}",
            )
    return table


def halves(of: Problem) -> tuple[Problem, Problem]:
    """The first half of the rows, and the second."""
    middle = len(of.targets) // 2
    return _rows(of, slice(middle)), _rows(of, slice(middle, 2 * middle))


def _rows(of: Problem, rows: slice) -> Problem:
    data = of.data
    part = replace(data, inputs=data.inputs[rows], bulk=data.bulk[rows], coordinates=data.coordinates[rows])
    return replace(of, data=part, targets=of.targets[rows])


def held_out(n: int) -> Table:
    """Whether the sizes of the terms go with the loss on held-out rows, at a tenth of the loss of the start."""
    found: dict[str, list[dict[str, float]]] = {}
    for act in ("softplus", "tanh", "ReLU"):
        for nu in (0.25, 0.375, 0.5):
            for alpha in (0.0, 0.5):
                for seed in range(SEEDS):
                    train, test = halves(problem(n, act, nu=nu, alpha=alpha, seed=seed))
                    ends = trained(train, (1.0, 0.1))
                    then = loss(replace(test, W=ends[1].W)) / loss(test)
                    parts = {
                        f"{name}, {when}": x for when, of in zip(WHEN, ends, strict=True) for name, x in of_all(of)
                    }
                    found.setdefault(f"{act}, {nu:g}, {alpha:g}", []).append(parts | {"loss": then})
    return against_loss("Spiked data: terms over their sum, against the held-out loss over that of the start", found)


WHEN = ("start", "end")


def of_all(of: Problem) -> Iterable[tuple[str, float]]:
    """Each term over the sum of all."""
    sizes = norms(of)
    return ((name, sizes[name] / sum(sizes.values())) for name in TERMS)


def against_loss(title: str, found: Findings) -> Table:
    """Spearman's correlations of shares with the loss: of seeds within settings, and of the means of settings."""
    settings, seeds = len(found), len(next(iter(found.values())))
    chance = [1 / math.sqrt(settings * (seeds - 1)), 1 / math.sqrt(settings - 1)]
    table = _table(title, "share", *(f"{kind}, chance 0 ± {x:.2f}" for kind, x in zip(KINDS, chance, strict=True)))
    for name in next(iter(found.values()))[0]:
        if name != "loss":
            rows = [([run[name] for run in runs], [run["loss"] for run in runs]) for runs in found.values()]
            within = fmean(_spearman(*pair) for pair in rows)
            between = _spearman(*([fmean(column) for column in columns] for columns in zip(*rows, strict=True)))
            table.add_row(name, f"{within:+.2f}", f"{between:+.2f}")
    return table


KINDS = ("seeds within settings", "means of settings")


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    return float(rank_persistence(torch.tensor(first), torch.tensor(second)))


class HeldOut(L.Callback):
    """The loss on held-out examples, before the first step and after every so many."""

    def __init__(self, data: TensorDataset, every: int) -> None:
        self._data, self._every = data, every
        self.losses: dict[int, float] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Before a batch."""
        module: Any = pl_module
        if trainer.global_step % self._every == 0:
            inputs, labels = self._data.tensors
            with torch.no_grad():
                self.losses[trainer.global_step] = float(F.cross_entropy(module.net(inputs), labels))


def of_training(data: TensorDataset, act: type[nn.Module], noise: float, seed: int, steps: int) -> dict[str, float]:
    """Shares of the callback and the held-out loss, where the loss of the batch has first halved."""
    L.seed_everything(seed, verbose=False)
    inputs, labels = data.tensors
    order, wrong = torch.randperm(len(labels)), torch.rand(len(labels)) < noise
    rows, others = order[: len(order) // 2], order[len(order) // 2 :]
    told = torch.where(wrong, torch.randint(10, labels.shape), labels)
    every, curves = 10, Curves()
    monitor = GradientAnatomyMonitor(every_n_steps=every, detail="standard", per_site=True)
    after = HeldOut(TensorDataset(inputs[others], labels[others]), every)
    silent: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        logger=curves,
        callbacks=[monitor, after],
        enable_progress_bar=False,
        accelerator="cpu",
        **silent,
    )
    batches = DataLoader(TensorDataset(inputs[rows], told[rows]), 128, shuffle=True, drop_last=True)
    trainer.fit(Classifier(inputs.shape[1], 10, act), batches)
    losses = curves.points["anatomy/loss"]
    step = next((at for at, value in losses.items() if value < 0.5 * losses[min(losses)]), max(losses))
    sites = ("net.0.weight", "net.2.weight")
    found = {
        f"{share}, {site}": curves.points[f"anatomy_{share}/{site}"].get(step, math.nan)
        for site in sites
        for share in SHARES
    }
    heard = min(after.losses, key=lambda at: abs(at - step))
    return found | {"loss": after.losses[heard]}


def held_out_real(steps: int) -> Table:
    """The same of digits and sentences, by the callback."""
    found: dict[str, list[dict[str, float]]] = {}
    for title, data in (("digits", digits()), ("sentences", sentences())):
        for act in (nn.GELU, nn.ReLU):
            for noise in (0.0, 0.3):
                runs = [of_training(data, act, noise, seed, steps) for seed in range(SEEDS)]
                found[f"{title}, {act.__name__}, {noise:g} of the labels at random"] = runs
    for name, runs in found.items():
        print(f"{name}: held-out loss {_range([run['loss'] for run in runs])}")
    return against_loss("Digits and sentences: shares where the loss has halved, against the held-out loss", found)


def vanishing(n: int) -> Table:
    """What is left where the expected derivative of the activation is 0, or goes to 0."""
    sizes = [f"{name}" for name in TERMS]
    title = "nu >= 1/2: means over five seeds; u1.s2 is the cosine of u1 with the spike term's"
    table = _table(title, "activation", "nu", "mean slope", *sizes, "S1 / S2", "v1.q", "u1.s2", "u1.u", "stable rank")
    for act in ("square", "cosine", "tanh", "softplus", "ReLU"):
        for nu in (0.5, 0.625, 0.75):
            rows = [_vanished(problem(n, act, nu=nu, seed=seed)) for seed in range(SEEDS)]
            table.add_row(act, f"{nu:g}", *_told([fmean(column) for column in zip(*rows, strict=True)]))
    return table


def _vanished(of: Problem) -> list[float]:
    found, seen, sizes = terms(of), directions(of), norms(of)
    left = torch.linalg.svd(of.gradient(), full_matrices=False)[0][:, 0]
    spike = abs(float(left @ F.normalize(found["S2"] @ of.data.direction, dim=0)))
    shown = [seen["v1.q"], spike, seen["u1.u"], seen["stable rank"]]
    return [float(found["mu"].abs().mean()), *sizes.values(), sizes["S1"] / sizes["S2"], *shown]


def dependent(n: int) -> Table:
    """The error against its bound, which is of W that does not depend on X, while W learns from X."""
    title = "E / (gamma max|r| |W| n^nu), mean (range) of five seeds; slope of log(E / max|r|) in log n"
    columns = [f"loss x {fraction:g}" for fraction in FRACTIONS]
    slopes = [f"slope, loss x {fraction:g}" for fraction in (FRACTIONS[0], FRACTIONS[-1])]
    table = _table(title, "activation", "scaling", "nu", "bound's slope", *columns, *slopes, "W has moved")
    for act in ("softplus", "GELU", "tanh", "ReLU"):
        for mean_field in (False, True):
            for nu in (0.0, 0.25):
                runs = {
                    rows: [
                        trained(problem(rows, act, nu=nu, seed=seed, mean_field=mean_field)) for seed in range(SEEDS)
                    ]
                    for rows in (n // 2, n, 2 * n)
                }
                constants = [[_constant(of, nu) for of in run] for run in runs[n]]
                told = [_range(column) for column in zip(*constants, strict=True)]
                ends = [_slope({rows: [run[i] for run in some] for rows, some in runs.items()}) for i in (0, -1)]
                moved = fmean(float((run[-1].W - run[0].W).norm() / run[0].W.norm()) for run in runs[n])
                bound = nu - (1.0 if mean_field else 0.5)
                scaling = "1 / m" if mean_field else "1 / sqrt(m)"
                slopes = [f"{slope:+.2f}" for slope in ends]
                table.add_row(act, scaling, f"{nu:g}", f"{bound:+.2f}", *told, *slopes, f"{moved:.2f}")
    return table


def _error(of: Problem) -> float:
    return norms(of)["E"] / float(of.residual.abs().max())


def _constant(of: Problem, nu: float) -> float:
    return _error(of) / (of.gamma * float(svd(of.W).top) * len(of.targets) ** nu)


def _slope(by_rows: Mapping[int, Sequence[Problem]]) -> float:
    points = [(math.log(rows), math.log(_error(of))) for rows, some in by_rows.items() for of in some]
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def _geometric(values: Sequence[float]) -> float:
    return math.exp(fmean(map(math.log, values)))


def _spread(values: Sequence[float]) -> str:
    return f"{_geometric(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def _range(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _told(values: Sequence[float]) -> list[str]:
    return [f"{value:.2g}" for value in values]


def main(only: Part | None = None, n: int = 150, steps: int = 150) -> None:
    """All questions, one after the other.

    Args:
        only: One of them; all unless given.
        n: Rows of spiked data.
        steps: Of the real trainings.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches|.*no number")
    torch.set_num_threads(1)
    rich.reconfigure(width=max(170, rich.get_console().width))
    questions: dict[Part, Callable[[], Table]] = {
        "transition": lambda: transition(n),
        "held_out": lambda: held_out(n),
        "held_out_real": lambda: held_out_real(steps),
        "vanishing": lambda: vanishing(n),
        "dependent": lambda: dependent(n),
    }
    for name, question in questions.items():
        if only in (None, name):
            rich.print(question())


if __name__ == "__main__":
    auto_cli(main)
