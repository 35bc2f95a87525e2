"""The participation ratio of a tangent kernel: ours against the explicit Jacobian, nngeometry and one-sided estimators; on one thread.

    python -m benchmarks.kernel

Every way runs in a process of its own, whose highest memory is counted from after the network was made. The truth is that of the explicit
Jacobian in float64.
"""

import importlib
import importlib.util
import math
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.budget import digits
from lightning_lowrank import traces
from lightning_lowrank.eigenspaces import top_eigenpairs
from lightning_lowrank.kernel_estimates import participation_ratio
from lightning_lowrank.kernels import kernel_operator, projections, sketched_kernel
from lightning_lowrank.operators import Jacobian

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
    """As the monitor does: the top by Lanczos, the rest by quadrature over four random vectors; 15 pairs of products."""
    jacobian, draw = Jacobian(net(images), list(net.parameters())), torch.Generator().manual_seed(seed)
    operator = kernel_operator(jacobian, "full")
    known = top_eigenpairs(operator, 3, num_products=7, generator=draw)
    whole = traces.spectral_estimate(operator, known=known, num_probes=4, steps=2, generator=draw)
    return float(traces.participation_ratio(whole).value)


def explicit(net: nn.Module, images: Tensor, seed: int) -> float:
    """Rows of gradients, by `torch.func.jacrev`, and their products with each other."""
    parts = jacrev(lambda params: functional_call(net, params, (images,)))(dict(net.named_parameters()))
    rows = torch.cat([part.detach().flatten(2).flatten(0, 1) for part in parts.values()], 1)
    return _ratio(rows @ rows.T)


def nngeometry(net: nn.Module, images: Tensor, seed: int) -> float:
    """The whole kernel, layer by layer, without the Jacobian."""
    gram = importlib.import_module("nngeometry.gram")
    layers = importlib.import_module("nngeometry.layercollection").LayerCollection.from_model(net)
    loader = DataLoader(TensorDataset(images, torch.zeros(len(images))), len(images))
    found = gram.GramMatrix(net, loader, function=lambda *batch: net(batch[0]), layer_collection=layers).data.detach()
    return _ratio(found.reshape(found.shape[0] * found.shape[1], -1))


def one_sided(num: int) -> Way:
    """Products of the Jacobian with so many random vectors, and pairs of these: nothing is taken out first (arXiv 2511.10796)."""

    def way(net: nn.Module, images: Tensor, seed: int) -> float:
        jacobian = Jacobian(net(images), list(net.parameters()))
        return float(participation_ratio(sketched_kernel(projections(jacobian, num=num, seed=seed), "full")).value)

    return way


WAYS: dict[str, Way] = {"ours": ours, "explicit Jacobian": explicit, "nngeometry": nngeometry}
WAYS |= {f"one-sided, {num} vectors": one_sided(num) for num in (16, 32, 64, 128)}
EXACT = ("explicit Jacobian", "nngeometry")


def _ratio(kernel: Tensor) -> float:
    return float(kernel.trace().double().square() / kernel.double().square().sum())


def _alone(queue: Any, name: str, width: int, outputs: int, num: int, trials: int) -> None:
    """In a process of its own: values, seconds of each, and bytes at most."""
    torch.set_num_threads(1)
    net, images = network(width, outputs), digits().tensors[0][:num]
    WAYS[name](net, images[:2], 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values, seconds = [], []
    for seed in range(1 if name in EXACT else trials):
        begin = time.perf_counter()
        values.append(WAYS[name](net, images, seed))
        seconds.append(time.perf_counter() - begin)
    queue.put((values, seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def alone(name: str, width: int, outputs: int, num: int, trials: int) -> tuple[list[float], float, float]:
    """Values, the median of the seconds and the bytes of a way."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    process = context.Process(target=_alone, args=(queue, name, width, outputs, num, trials))
    process.start()
    values, seconds, memory = queue.get(timeout=600)
    process.join()
    return values, sorted(seconds)[len(seconds) // 2], memory


def compared(width: int, outputs: int, num: int, trials: int, ways: list[str]) -> Table:
    """All ways on one network."""
    found = {name: alone(name, width, outputs, num, trials) for name in ways}
    (truth,), base_time, base_memory = found["explicit Jacobian"]
    parameters = sum(p.numel() for p in network(width, outputs).parameters())
    table = Table(title=f"Participation ratio ({truth:.2f}), {num} examples x {outputs} outputs, {parameters:,} parameters")
    for heading in ("way", "error, rms over seeds", "seconds", "times cheaper", "MB", "times less"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, (values, seconds, memory) in found.items():
        error = math.sqrt(sum((value / truth - 1) ** 2 for value in values) / len(values))
        cheaper, less = f"{base_time / seconds:.1f}", f"{base_memory / max(memory, 1):.1f}"
        table.add_row(name, f"{100 * error:.2g} %", f"{seconds:.3f}", cheaper, f"{memory / 2**20:.0f}", less)
    return table


def main(trials: int = 20) -> None:
    """Print the tables.

    Args:
        trials: Seeds of estimates.
    """
    torch.set_num_threads(1)
    ways = [name for name in WAYS if name != "nngeometry" or importlib.util.find_spec("nngeometry")]
    console = Console(width=140)
    console.print(compared(256, 10, 400, trials, ways))
    for width, outputs, num in ((64, 10, 400), (512, 10, 200), (256, 10, 100), (256, 40, 100)):
        console.print(compared(width, outputs, num, trials, ["ours", "explicit Jacobian"]))


if __name__ == "__main__":
    auto_cli(main)
