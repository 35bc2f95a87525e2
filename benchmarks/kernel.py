"""The participation ratio of a tangent kernel: ours against the explicit Jacobian, nngeometry and one-sided estimators;
on one thread.

    python -m benchmarks.kernel

Every way runs in a process of its own, whose highest memory is counted from after the network was made and a small
kernel was seen. The truth is what the explicit Jacobian gives. Seconds are of the processor. Then what a sample of
`NTKMonitor` costs, in training steps.
"""

import importlib
import importlib.util
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.budget import DigitsMLP, digits
from benchmarks.curvature import Convolutional
from benchmarks.overhead import quiet
from examples.char_transformer import CharTransformer, standard_library
from examples.edge_of_stability import Curves
from lightning_lowrank import NTKMonitor
from lightning_lowrank.maths.operators import traces
from lightning_lowrank.maths.operators.eigenspaces import top_eigenpairs
from lightning_lowrank.maths.operators.operators import Jacobian
from lightning_lowrank.monitors.tangent_kernel.estimates import participation_ratio
from lightning_lowrank.monitors.tangent_kernel.kernels import KernelName, kernel_operator, projections, sketched_kernel
from lightning_lowrank.monitors.tangent_kernel.source import EVERY

Way = Callable[[nn.Module, Tensor, int], float]


def network(width: int, outputs: int) -> nn.Module:
    """Two hidden layers, trained for a moment on digits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs))
    images, labels = digits().tensors
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(100):
        drawn = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[drawn]), labels[drawn]).backward()
        optimizer.step()
    return net


def ours(net: nn.Module, images: Tensor, seed: int) -> float:
    """As the monitor does, less what its other ranks take: the top by Lanczos, the rest from four random vectors; 15
    pairs of products.
    """
    jacobian, draw = Jacobian(net(images), list(net.parameters())), torch.Generator().manual_seed(seed)
    operator = kernel_operator(jacobian, "full")
    known = top_eigenpairs(operator, 3, num_products=7, generator=draw)
    whole = traces.spectral_estimate(operator, traces.random_signs(operator, 4, draw), known=known, steps=2)
    return float(traces.participation_ratio(whole).value)


def explicit(net: nn.Module, images: Tensor, seed: int) -> float:
    """Rows of gradients, by `torch.func.jacrev` for each example, and their products with each other, one parameter
    after the other.
    """
    named = {name: p.detach() for name, p in net.named_parameters()}
    rows = vmap(jacrev(lambda named, image: functional_call(net, named, (image,))), (None, 0), chunk_size=50)(
        named, images
    )
    kernel = torch.zeros(())
    for part in rows.values():
        flat = part.flatten(2).flatten(0, 1)
        kernel = kernel + flat @ flat.T
    return _ratio(kernel)


def nngeometry(net: nn.Module, images: Tensor, seed: int) -> float:
    """The whole kernel, layer by layer, without the Jacobian."""
    gram = importlib.import_module("nngeometry.gram")
    layers = importlib.import_module("nngeometry.layercollection").LayerCollection.from_model(net)
    loader = DataLoader(TensorDataset(images, torch.zeros(len(images))), len(images))
    found = gram.GramMatrix(net, loader, function=lambda *batch: net(batch[0]), layer_collection=layers).data.detach()
    return _ratio(found.reshape(found.shape[0] * found.shape[1], -1))


def one_sided(num: int) -> Way:
    """Products of the Jacobian with so many random vectors, and pairs of these: nothing is taken out first (arXiv
    2511.10796).
    """

    def way(net: nn.Module, images: Tensor, seed: int) -> float:
        jacobian = Jacobian(net(images), list(net.parameters()))
        return float(participation_ratio(sketched_kernel(projections(jacobian, num=num, seed=seed), "full")).value)

    return way


WAYS: dict[str, Way] = {"ours": ours, "explicit Jacobian": explicit, "nngeometry": nngeometry}
ONE_SIDED = {f"one-sided, {num} vectors": num for num in (32, 64, 128)}
WAYS |= {name: one_sided(num) for name, num in ONE_SIDED.items()}
EXACT = ("explicit Jacobian", "nngeometry")


@dataclass(frozen=True)
class Size:
    """A network, and the examples that its kernel is of."""

    width: int
    outputs: int
    examples: int

    @property
    def parameters(self) -> int:
        """Entries of all of them."""
        return sum(p.numel() for p in network(self.width, self.outputs).parameters())


@dataclass(frozen=True)
class Cost:
    """What a way found, the median of its seconds, and the bytes that it took beyond what was there."""

    values: list[float]
    seconds: float
    memory: float

    def error(self, truth: float) -> float:
        """Relative, rms over trials."""
        return math.sqrt(sum((value / truth - 1) ** 2 for value in self.values) / len(self.values))


def _ratio(kernel: Tensor) -> float:
    return float(kernel.trace().double().square() / kernel.double().square().sum())


def _alone(queue: Any, name: str, size: Size, trials: int) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    net, images = network(size.width, size.outputs), digits().tensors[0][: size.examples]
    WAYS[name](net, images[:2], 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values, seconds = [], []
    for seed in range(1 if name in EXACT else trials):
        begin = time.process_time()
        values.append(WAYS[name](net, images, seed))
        seconds.append(time.process_time() - begin)
    queue.put(Cost(values, median(seconds), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def alone(name: str, size: Size, trials: int) -> Cost:
    """What a way costs."""
    # Forked, so that nothing is imported again; this process has one thread.
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    process = context.Process(target=_alone, args=(queue, name, size, trials))
    process.start()
    found: Cost = queue.get(timeout=600)
    process.join()
    return found


def compared(size: Size, trials: int, ways: Sequence[str]) -> Table:
    """All ways on one network."""
    found = {name: alone(name, size, trials) for name in ways}
    base = found["explicit Jacobian"]
    (truth,) = base.values
    what = f"{size.examples} examples x {size.outputs} outputs, {size.parameters:,} parameters, {trials} trials"
    table = Table(title=f"Participation ratio ({truth:.2f}), {what}")
    for heading in ("way", "error, rms", "seconds", "times cheaper", "MB", "times less"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, cost in found.items():
        megabytes = max(1.0, cost.memory / 2**20)
        known = [
            f"{cost.seconds:.3f}",
            f"{base.seconds / cost.seconds:.1f}",
            f"{megabytes:.0f}",
            f"{base.memory / 2**20 / megabytes:.0f}",
        ]
        table.add_row(name, f"{100 * cost.error(truth):.2g} %", *known)
    # Errors fall with the root of the number of vectors, and the time grows with it.
    effort = median(found[name].error(truth) ** 2 * found[name].seconds for name in ONE_SIDED)
    needed = effort / found["ours"].error(truth) ** 2
    table.add_row("one-sided, as exact as ours", "", f"{needed:.3f}", f"{base.seconds / needed:.1f}", "", "")
    return table


def growth(trials: int) -> Table:
    """Ours and the explicit Jacobian, with more parameters, examples and outputs."""
    base = Size(256, 10, 100)
    few = {"": base, "parameters": Size(512, 10, 100), "examples": Size(256, 10, 200), "outputs": Size(256, 20, 100)}
    many = {
        "parameters, more": Size(1024, 10, 100),
        "examples, more": Size(256, 10, 800),
        "outputs, more": Size(256, 80, 100),
    }
    table = Table(title="What grows")
    for heading in (
        "",
        "parameters",
        "examples",
        "outputs",
        "ours: error, rms",
        "seconds",
        "MB",
        "explicit: seconds",
        "MB",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for name, size in (few | many).items():
        found, other = alone("ours", size, trials), alone("explicit Jacobian", size, 1) if name in few else None
        cells = [
            f"{100 * found.error(other.values[0]):.2g} %" if other else "-",
            f"{found.seconds:.3f}",
            f"{found.memory / 2**20:.0f}",
        ]
        cells += [f"{other.seconds:.2f}", f"{other.memory / 2**20:.0f}"] if other else ["-", "-"]
        table.add_row(name, f"{size.parameters:,}", str(size.examples), str(size.outputs), *cells)
    return table


class Clock(L.Callback):
    """Processor time at which each step began."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Now."""
        self.begun.append(time.process_time())


def sample_in_steps(
    make: Callable[[], L.LightningModule], data: TensorDataset, size: int, kernel: KernelName
) -> tuple[float, float]:
    """Milliseconds of a step, and the last of three samples in such steps: the first has nothing to compare with."""
    L.seed_everything(0, verbose=False)
    every, clock = 12, Clock()
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    callbacks = [clock, NTKMonitor(kernel=kernel, every_n_steps=every)]
    trainer = L.Trainer(**silent, logger=Curves(), max_epochs=-1, max_steps=2 * every + 2, callbacks=callbacks)
    trainer.fit(make(), DataLoader(data, size, shuffle=True, drop_last=True))
    taken = [after - before for before, after in pairwise(clock.begun)]
    step = median(seconds for place, seconds in enumerate(taken) if place % every)
    return 1000 * step, taken[2 * every] / step - 1


def samples() -> Table:
    """Each kernel of each network, with the defaults of the monitor."""
    quiet()
    nets: dict[str, tuple[Callable[[], L.LightningModule], TensorDataset, int]] = {
        "digits MLP, batch 64": (DigitsMLP, digits(), 64),
        "conv net, batch 256": (Convolutional, digits(), 256),
        "char transformer, 16 x 64": (
            lambda: CharTransformer(100, depth=2, width=64),
            TensorDataset(standard_library()),
            16,
        ),
    }
    table = Table(
        title="A sample of NTKMonitor in units of a training step, and what that is of the time at the default cadence"
    )
    for heading in ("training", "step, ms", *(f"{kernel}, every {every}" for kernel, every in EVERY.items())):
        table.add_column(heading, justify="left" if heading == "training" else "right")
    kernels: list[KernelName] = ["full", "class_summed", "sum_of_logits"]
    for name, net in nets.items():
        found = {kernel: sample_in_steps(*net, kernel) for kernel in kernels}
        cells = [f"{steps:.0f} ({100 * steps / EVERY[kernel]:.1f} %)" for kernel, (_, steps) in found.items()]
        table.add_row(name, f"{median(step for step, _ in found.values()):.1f}", *cells)
    return table


def main(trials: int = 16) -> None:
    """Print the tables.

    Args:
        trials: Seeds of estimates.
    """
    torch.set_num_threads(1)
    console = Console(width=150)
    peer = importlib.util.find_spec("nngeometry") is not None
    if not peer:
        console.print("nngeometry is not installed, and left out")
    console.print(compared(Size(256, 10, 400), trials, [name for name in WAYS if name != "nngeometry" or peer]))
    console.print(growth(trials))
    console.print(samples())


if __name__ == "__main__":
    auto_cli(main)
