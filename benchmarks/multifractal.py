"""Multifractal statistics of all neurons: ours against the published recipe in loops, on one thread, in one run.

And what independent weights give, and weights whose rows differ; and what watching costs in a training.

python -m benchmarks.multifractal [--repeats 5] [--without-block] [--draws 2000] [--watching-only] [--without-watching]
"""

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import lightning as L
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from examples.char_transformer import CharTransformer, standard_library
from examples.multifractal_training import convolutional, digits
from lightning_lowrank import MultifractalMonitor
from lightning_lowrank.maths.scaling.multifractal import multifractal_spectrum
from lightning_lowrank.maths.scaling.scaling import ORDERS, Scaling
from lightning_lowrank.statistics import find
from lightning_lowrank.statistics.registry import REGISTERED

THRESHOLD = 150.0
STATISTICS = [name for name, found in REGISTERED.items() if found.takes == (Scaling,)]


def demo() -> list[Tensor]:
    """Every matrix of the blocks of the demo's transformer; queries, keys and values apart."""
    blocks = CharTransformer(vocabulary=100).blocks
    return [
        part.detach()
        for p in blocks.parameters()
        if p.ndim == 2
        for part in (p.chunk(3) if p.shape[0] == 3 * p.shape[1] else [p])
    ]


def block() -> list[Tensor]:
    """The four matrices of one block of GPT-2 small, as they are initialised."""
    draw = torch.Generator().manual_seed(0)
    return [0.02 * torch.randn(*shape, generator=draw) for shape in ((2304, 768), (768, 768), (3072, 768), (768, 3072))]


def rank(matrices: Sequence[Tensor]) -> list[Tensor]:
    """All statistics of every matrix in both directions; those of one shape as one batch."""
    shapes = dict.fromkeys(matrix.shape for matrix in matrices)
    batches = [torch.stack([matrix for matrix in matrices if matrix.shape == shape]) for shape in shapes]
    scalings = [multifractal_spectrum(batch, direction=direction) for batch in batches for direction in ("in", "out")]
    return [find(name)(scaling) for scaling in scalings for name in STATISTICS]


def published(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Our form of the published recipe, each matrix and direction on its own, as in rank mode."""
    return [
        multifractal_spectrum([m], "neuromfa", direction=d, threshold=THRESHOLD).tau
        for m in matrices
        for d in ("in", "out")
    ]


def loops(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The same in Python, neuron by neuron and radius by radius, as its authors write it."""
    return [loop(rows) for m in matrices for rows in (m.double().numpy(), m.mT.double().numpy())]


def loop(weights: np.ndarray) -> Tensor:
    """Exponents tau of one network: edges counted by rounded length, masses by adding up the counts, slopes by least
    squares.
    """
    neurons = []
    for row in weights:
        lengths = [1 / abs(w) for w in row if w != 0]
        kept = [length for length in lengths if 1 < length <= THRESHOLD]
        if len(kept) > 10:
            neurons.append(Counter(np.round(kept).tolist()))
    radii = sorted(set().union(*neurons))
    masses = np.ones((len(neurons), len(radii)))
    for i, counted in enumerate(neurons):
        for j, radius in enumerate(radii):
            masses[i, j] += sum(count for length, count in counted.items() if length <= radius)
    partitions = [((masses / masses[:, -1:]) ** q).sum(0) for q in ORDERS]
    return torch.tensor(
        [np.polyfit(np.log(radii), np.log(partition), 1)[0] for partition in partitions], dtype=torch.float64
    )


def seconds(job: Callable[[Sequence[Tensor]], object], matrices: Sequence[Tensor], repeats: int) -> float:
    """Median processor time of a job."""
    taken = []
    for _ in range(repeats):
        begin = time.process_time()
        job(matrices)
        taken.append(time.process_time() - begin)
    return median(taken)


def row(what: str, matrices: Sequence[Tensor], repeats: int) -> tuple[str, ...]:
    """One line of the table."""
    rank(matrices)
    ours, recipe, theirs = (
        seconds(rank, matrices, repeats),
        seconds(published, matrices, repeats),
        seconds(loops, matrices, 1),
    )
    sizes = f"{sum(sum(m.shape) for m in matrices)}", f"{sum(m.numel() for m in matrices) / 1e6:.2f}"
    return (
        what,
        *sizes,
        f"{ours:.3f}",
        f"{recipe:.3f}",
        f"{theirs:.1f}",
        f"{theirs / ours:.0f}",
        f"{theirs / recipe:.0f}",
    )


def difference(matrices: Sequence[Tensor]) -> float:
    """The most that our exponents and those of the loops are apart."""
    return max(
        float((one - other).abs().max()) for one, other in zip(published(matrices), loops(matrices), strict=True)
    )


def of_draws(draws: int, shape: tuple[int, int], spread: float) -> dict[str, Tensor]:
    """All statistics of Gaussian matrices whose rows have scales that differ so much."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(0, draws, 100):
        scales = (spread * torch.randn(100, shape[0], 1, generator=draw)).exp()
        scaling = multifractal_spectrum(scales * torch.randn(100, *shape, generator=draw), direction="in")
        found.append(torch.stack([find(name)(scaling) for name in STATISTICS]))
    return dict(zip(STATISTICS, torch.cat(found, -1), strict=True))


def chance_row(shape: tuple[int, int], draws: int) -> tuple[str, ...]:
    """What independent weights give, and how far rows that differ by 5 % stand out from it, in standard deviations."""
    chance, seen = of_draws(draws, shape, 0.0), of_draws(100, shape, 0.05)
    widths = chance["width_over_floor"][chance["valid"] == 1]
    alarms = (chance["dispersion"] > chance["dispersion_chance"]).double().mean()
    parts = [
        (seen[name].nanmean() - chance[name].nanmean()) / chance[name][chance["valid"] == 1].std()
        for name in ("dispersion", "c2_excess")
    ]
    cells = f"{chance['alpha0'].nanmean():.3f}", f"{widths.mean():.2f}", f"{widths.amax():.1f}", f"{alarms:.2%}"
    return (
        f"{shape[0]} x {shape[1]}",
        *cells,
        *(f"{float(part):.1f}" for part in parts),
        f"{chance['valid'].mean():.1%}",
    )


class Clock(L.Callback):
    """Processor time when each batch begins, before the monitor."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun.append(time.process_time())


def watching_row(
    what: str, module: L.LightningModule, data: TensorDataset, batch_size: int, **options: Any
) -> tuple[str, ...]:
    """What a sample takes, by the steps in which one is due and those in which none is, and its share at the default
    cadence.
    """
    clock, batches = Clock(), DataLoader(data, batch_size, shuffle=True, drop_last=True)
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
    }
    L.Trainer(max_steps=15, callbacks=[clock, MultifractalMonitor(every_n_steps=2, **options)], **silent).fit(
        module, batches
    )
    taken = [after - before for before, after in pairwise(clock.begun[2:])]
    with_it, plain = median(taken[::2]), median(taken[1::2])
    sample = with_it - plain
    share = sample / (sample + 500 * plain)
    return (
        what,
        " ".join(f"{key}={value!r}" for key, value in options.items()),
        f"{1000 * plain:.0f}",
        f"{1000 * sample:.0f}",
        f"{share:.1%}",
    )


def watching() -> Table:
    """What it costs in trainings."""
    warnings.filterwarnings("ignore")
    columns = ["training", "options", "a step, ms", "a sample, ms", "share, every 500 steps"]
    table = Table(*columns, title="Cost of watching, processor time of one thread")
    text = TensorDataset(standard_library())
    for options in ({"mode": "rank"}, {"mode": "neuromfa"}, {"mode": "neuromfa", "max_neurons": 32}):
        table.add_row(
            *watching_row("the demo's transformer, 32 x 64", CharTransformer(vocabulary=100), text, 32, **options)
        )
        table.add_row(*watching_row("convolutions on digits, 64", convolutional(), digits(), 64, **options))
    return table


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--without-block", action="store_true")
    options.add_argument("--draws", type=int, default=2000)
    options.add_argument("--watching-only", action="store_true")
    options.add_argument("--without-watching", action="store_true")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)
    if not chosen.without_watching:
        console.print(watching())
    if chosen.watching_only:
        return
    columns = [
        "network",
        "neurons",
        "million weights",
        "rank, s",
        "neuromfa, s",
        "loops, s",
        "loops / rank",
        "loops / neuromfa",
    ]
    table = Table(
        *columns, title="Multifractal statistics of all neurons in both directions, processor time of one thread"
    )
    table.add_row(*row("the demo's transformer", demo(), chosen.repeats))
    if not chosen.without_block:
        table.add_row(*row("a block of GPT-2 small", block(), chosen.repeats))
    console.print(table)
    console.print(f"neuromfa and loops differ by at most {difference(demo()[:4]):.0e} in tau")
    columns = [
        "rows x columns",
        "alpha0",
        "width / floor",
        "at most",
        "beyond dispersion_chance",
        "5 %: dispersion",
        "5 %: c2_excess",
        "valid",
    ]
    title = (
        f"{chosen.draws} matrices of independent weights; rows whose scales differ by 5 %, in "
        "standard deviations of those"
    )
    chance = Table(*columns, title=title)
    for shape in ((10, 128), (64, 64), (128, 32), (256, 128), (256, 256), (64, 1024)):
        chance.add_row(*chance_row(shape, chosen.draws))
    console.print(chance)


if __name__ == "__main__":
    main()
