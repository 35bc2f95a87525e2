"""What curvature costs: products in units of a forward and backward pass, samples in units of a training step; on one
thread, in one run.

    python -m benchmarks.curvature

PyHessian, where it is installed, is asked for the same five eigenvalues and the trace of the same network.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.budget import digits
from benchmarks.overhead import quiet
from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import CurvatureMonitor
from lightning_lowrank.loss.tap import LossTap
from lightning_lowrank.maths.operators.eigenspaces import Eigenpairs, overlap, top_eigenpairs
from lightning_lowrank.maths.operators.operators import Jacobian, Operator, dense, gauss_newton, hessian
from lightning_lowrank.maths.operators.traces import debiased, random_signs, spectral_estimate, trace

Job = Callable[[], object]


def times(jobs: dict[str, Job], repeats: int) -> dict[str, float]:
    """Least seconds of each job, the jobs in turn."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            taken[name].append(time.perf_counter() - begin)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


def products(repeats: int) -> Table:
    """Hessian and Gauss-Newton products of the demo's transformer, with attention in plain torch."""
    torch.manual_seed(0)
    net, text = CharTransformer(100), standard_library()[:16]
    params = list(net.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def step() -> None:
        torch.autograd.grad(loss(), params)

    with sdpa_kernel(SDPBackend.MATH):
        tap = LossTap()
        with tap:
            value = loss()
        outputs = tap.reproduce(value)
        gradient, exact = hessian(value, params)
        approximate = gauss_newton(Jacobian(outputs.outputs, params), outputs.hessian_product)
        jobs: dict[str, Job] = {
            "forward and backward": step,
            "Hessian product": lambda: exact.multiply(gradient),
            "Gauss-Newton product": lambda: approximate.multiply(gradient),
        }
        found = times(jobs, repeats)
    table = Table(title=f"Products, transformer of {len(gradient):,} parameters, attention in plain torch")
    table.add_column("what")
    table.add_column("forward-backwards", justify="right")
    for name, seconds in found.items():
        table.add_row(name, f"{seconds / found['forward and backward']:.2f}")
    return table


class Convolutional(L.LightningModule):
    """Convolutions and batch normalisation on digits: seen on the live graph."""

    def __init__(self) -> None:
        super().__init__()
        body = (nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        self.net = nn.Sequential(*body, nn.Flatten(), nn.Linear(64 * 16, 10))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0].reshape(-1, 1, 8, 8)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Costs(Logger):
    """Keeps what each sample took."""

    name, version = "costs", 0

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Milliseconds of the monitor's own."""
        self.seconds += [value / 1000 for tag, value in metrics.items() if tag == "lowrank/curvature_time_ms"]

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """None."""


def sample_in_steps(make: Callable[[], L.LightningModule], data: TensorDataset, size: int, level: Any) -> float:
    """What a sample costs, in training steps: the median of those after the first, in which products are checked."""
    quiet()
    L.seed_everything(0, verbose=False)
    batches, costs = DataLoader(data, size, shuffle=True, drop_last=True), Costs()
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    num_samples = 2 if level == "full" else 5
    monitor = CurvatureMonitor(level, every_n_steps=2, detail="standard")
    L.Trainer(**silent, logger=costs, max_steps=2 * num_samples, callbacks=[monitor]).fit(make(), batches)
    module, seconds = make(), list[float]()

    class Clock(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seconds.append(time.perf_counter())

    L.Trainer(**silent, logger=False, max_steps=24, callbacks=[Clock()]).fit(module, batches)
    step = median(after - before for before, after in pairwise(seconds[4:]))
    return median(costs.seconds[1:]) / step


def samples() -> Table:
    """Each level, on the live graph and by replay."""
    table = Table(
        title="A sample in units of a training step, and what that is of the training time at the default cadence"
    )
    for heading in ("level", "every", "conv net, live graph", "share", "char transformer, replay", "share"):
        table.add_column(heading, justify="left" if heading == "level" else "right")
    text = TensorDataset(standard_library())
    for level, every in (("light", 100), ("standard", 2000), ("full", 25000)):
        live = sample_in_steps(Convolutional, digits(), 256, level)
        replayed = sample_in_steps(lambda: CharTransformer(100, depth=2, width=64), text, 16, level)
        shares = [f"{100 * steps / every:.1f} %" for steps in (live, replayed)]
        table.add_row(level, str(every), f"{live:.1f}", shares[0], f"{replayed:.1f}", shares[1])
    return table


def products_needed(net: nn.Module, images: Tensor, labels: Tensor, start: Tensor | None) -> tuple[int, Tensor]:
    """How many products the largest eigenvalue takes to be known within 1 %; and the five top directions."""
    gradient, operator = hessian(F.cross_entropy(net(images), labels), list(net.parameters()))

    def found(number: int, k: int, begin: Tensor | None) -> Eigenpairs:
        draw = torch.Generator().manual_seed(number)
        return top_eigenpairs(operator, k, start=begin, further=gradient[None], num_products=number, generator=draw)

    truth = found(60, 5, None)
    return next(
        n for n in range(1, 60) if abs(found(n, 1, start).values[0] / truth.values[0] - 1) < 0.01
    ), truth.vectors


def following() -> Table:
    """Products with the Hessian until its top is known, from nothing and from the directions of the last sample."""
    torch.manual_seed(0)
    images, labels = digits().tensors
    images, labels = images[:512], labels[:512]
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    rows: dict[str, list[tuple[int, int]]] = {"little moved (overlap above 0.9)": [], "moved": []}
    before: Tensor | None = None
    for step in range(401):
        if step % 20 == 0:
            cold, vectors = products_needed(net, images, labels, None)
            if before is not None:
                name = next(iter(rows)) if overlap(vectors, before) > 0.9 else "moved"
                rows[name].append((products_needed(net, images, labels, before)[0], cold))
            before = vectors
        optimizer.zero_grad()
        drawn = torch.randint(len(images), (64,))
        F.cross_entropy(net(images[drawn]), labels[drawn]).backward()
        optimizer.step()
    table = Table(
        title="Products until the largest eigenvalue is known within 1 %, digits MLP, a sample every 20 steps"
    )
    for heading in (
        "top directions since the last sample",
        "samples",
        "from them: median",
        "worst",
        "from the gradient: median",
        "worst",
    ):
        table.add_column(heading, justify="right")
    for name, counts in rows.items():
        warm, cold_counts = (sorted(column) for column in zip(*counts, strict=True)) if counts else ([0], [0])
        known = (len(counts), int(median(warm)), warm[-1], int(median(cold_counts)), cold_counts[-1])
        table.add_row(name, *map(str, known))
    return table


def digits_net() -> tuple[nn.Module, Tensor, Tensor]:
    """An MLP after 200 steps of gradient descent, and what it learns."""
    torch.manual_seed(0)
    images, labels = digits().tensors
    net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net, images, labels


def trained_digits() -> tuple[Operator, Tensor]:
    """Its Hessian, as a dense matrix, and its gradient."""
    net, images, labels = digits_net()
    gradient, operator = hessian(F.cross_entropy(net(images), labels), list(net.parameters()))
    matrix = dense(operator)
    return replace(operator, multiply=lambda vector: matrix @ vector), gradient


def peer(repeats: int) -> Table | None:
    """Five eigenvalues and the trace, with their errors, by us and by PyHessian."""
    try:
        pyhessian = importlib.import_module("pyhessian")
    except ImportError:
        return None
    net, images, labels = digits_net()
    params = list(net.parameters())
    truth = torch.linalg.eigvalsh(dense(hessian(F.cross_entropy(net(images), labels), params)[1]).double()).flip(0)

    def ours() -> tuple[Tensor, float]:
        gradient, operator = hessian(F.cross_entropy(net(images), labels), params)
        draw = torch.Generator().manual_seed(0)
        pairs = top_eigenpairs(operator, 5, further=gradient[None], num_products=14, generator=draw)
        whole = spectral_estimate(operator, random_signs(operator, 4, draw), known=pairs.space, steps=1)
        return pairs.values, float(debiased(trace, whole.spectrum).value)

    def theirs() -> tuple[Tensor, float]:
        found = pyhessian.hessian(net, nn.CrossEntropyLoss(), data=(images, labels), cuda=False)
        values, _ = found.eigenvalues(maxIter=100, tol=1e-3, top_n=5)
        return torch.tensor(values), float(torch.tensor(found.trace()).mean())

    taken = times({"ours": ours, "PyHessian": theirs}, repeats)
    table = Table(
        title=f"Five largest eigenvalues and the trace, digits MLP of {sum(p.numel() for p in params):,} parameters"
    )
    for heading in ("", "ms", "worst error of an eigenvalue", "error of the trace"):
        table.add_column(heading, justify="right")
    for name, job in (("ours", ours), ("PyHessian", theirs)):
        values, total = job()
        worst = ((values.double() - truth[:5]) / truth[:5]).abs().max()
        table.add_row(
            name, f"{1000 * taken[name]:.0f}", f"{100 * worst:.2f} %", f"{100 * abs(total / truth.sum() - 1):.2f} %"
        )
    return table


def main(repeats: int = 7) -> None:
    """Print the tables.

    Args:
        repeats: Of each timing.
    """
    torch.set_num_threads(1)
    console = Console(width=150)
    console.print(products(repeats))
    console.print(following())
    console.print(samples())
    if (table := peer(3)) is not None:
        console.print(table)


if __name__ == "__main__":
    auto_cli(main)
