"""What `AttentionMonitor` costs: the update of all heads of GPT-2 medium's shape, beside dense decompositions; and the
due steps of the demo's model beside the steps before and after, on one thread.

    python -m benchmarks.attention
"""

import resource
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch.utils.data import TensorDataset

from benchmarks.overhead import quiet, seconds
from examples.char_transformer import standard_library
from lightning_lowrank import AttentionMonitor, decompose, statistics
from lightning_lowrank.maths.attention_circuits import circuit_updates
from lightning_lowrank.maths.spectra.spectrum import Spectrum

LAYERS, HEADS, WIDTH, HEAD = 24, 16, 1024, 64
# How often one head is decomposed densely; the faster counts.
DENSE = 2
# Steps from sample to sample: when it is timed, and in the default.
EVERY, USUAL = 4, 50
LAYOUTS = {"blocks.*.qkv.weight": "qkv heads d"}


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def peak() -> float:
    """Most MiB that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ranks(spectra: list[Spectrum]) -> list[torch.Tensor]:
    """Of each spectrum."""
    return [
        rank(spectrum) for spectrum in spectra for rank in (statistics.stable_rank, statistics.effective_rank_energy)
    ]


def at_once(parts: list[torch.Tensor], some: int) -> list[torch.Tensor]:
    """All heads, some layers in one batch of factorisations, all of them in one batch of eigenproblems."""
    groups = zip(*(part.split(some) for part in parts), strict=True)
    return ranks(decompose([core for group in groups for core in circuit_updates(*group)], "values").spectra)


def dense(parts: list[torch.Tensor]) -> None:
    """Both products of one head, whole."""
    q, k, dq, dk = (part[0, 0].double() for part in parts)
    for matrix in (dq.mT @ k + q.mT @ dk, dq.mT @ dk):
        torch.linalg.svdvals(matrix)


def of_gpt2_medium() -> Table:
    """Time and memory."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(LAYERS, HEADS, HEAD, WIDTH, generator=generator) for _ in range(4)]
    before = peak()
    ours = timed(partial(at_once, parts, 4))
    memory = peak() - before
    one = min(timed(partial(dense, parts)) for _ in range(DENSE))
    heads = LAYERS * HEADS
    table = Table("D2 and D3 of 24 layers of 16 heads, width 1024, one thread", "seconds", "MiB beyond the weights")
    table.add_row("thin QR, one batch of eigenproblems", f"{ours:.1f}", f"{memory:.0f}")
    table.add_row(f"dense SVDs of one head, the fastest of {DENSE} times, times {heads}", f"{one * heads:.0f}", "")
    return table


class Begins(L.Callback):
    """Processor time at which each step began, which other work on the machine does not touch."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Look at the clock."""
        self.at.append(time.process_time())

    def more(self) -> tuple[float, float]:
        """Percent by which training takes longer at the usual cadence, and its standard error: each due step beside
        the mean of its two neighbours.
        """
        taken = [end - begin for begin, end in pairwise(self.at)]
        due = range(2 * EVERY, len(taken) - 1, EVERY)
        extra = [taken[i] - (taken[i - 1] + taken[i + 1]) / 2 for i in due]
        step = mean(taken[i - 1] for i in due)
        percent = 100 / (USUAL * step)
        return percent * mean(extra), percent * stdev(extra) / len(extra) ** 0.5


def of_demo(steps: int) -> Table:
    """What a sample adds, and what the monitor's own clock says."""
    windows = TensorDataset(standard_library())
    seconds(windows, 32, 10, AttentionMonitor(layouts=LAYOUTS))  # warms up, and makes the null of this shape
    table = Table(f"demo, batch 32 x 64, at every {USUAL} steps", "more, %", "standard error", "own clock, %")
    for scores in (True, False):
        monitor, begins = AttentionMonitor(EVERY, layouts=LAYOUTS, scores=scores), Begins()
        seconds(windows, 32, steps, monitor, begins)
        figures = (*begins.more(), monitor.overhead * EVERY / USUAL)
        table.add_row(f"scores={scores}", *(f"{figure:.3f}" for figure in figures))
    return table


def main(steps: int = 480) -> None:
    """Print both tables.

    Args:
        steps: Of each training of the demo.
    """
    quiet()
    console = Console(width=110)
    console.print(of_gpt2_medium())
    console.print(of_demo(steps))


if __name__ == "__main__":
    auto_cli(main)
