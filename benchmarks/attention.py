"""What `AttentionMonitor` costs: the update of all heads of GPT-2 medium's shape, beside dense decompositions; and the
training of the demo's model, watched and not, on one thread.

    python -m benchmarks.attention --pairs 3
"""

import resource
import time
from collections.abc import Callable
from functools import partial

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
# Dense matrices that are decomposed; all would take hours.
DENSE = 2
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
    table.add_row(f"dense, numpy's way, {DENSE} heads timed and times {heads}", f"{one * heads:.0f}", "")
    return table


def of_demo(pairs: int, steps: int = 200) -> Table:
    """The monitor's own clock, and paired trainings."""
    windows = TensorDataset(standard_library())
    seconds(windows, 32, 10, AttentionMonitor(layouts=LAYOUTS))  # warms up, and makes the null of this shape
    table = Table("demo, batch 32 x 64, every 50 steps", "own clock, %", "more, % (each pair)")
    for scores in (True, False):
        clock, more = [], []
        for pair in range(pairs):
            monitor = AttentionMonitor(layouts=LAYOUTS, scores=scores)
            turns = (None, monitor) if pair % 2 else (monitor, None)
            times = {one is not None: seconds(windows, 32, steps, one) for one in turns}
            clock.append(monitor.overhead)
            more.append(100 * (times[True] / times[False] - 1))
        table.add_row(
            f"scores={scores}",
            f"{sorted(clock)[len(clock) // 2]:.2f}",
            ", ".join(f"{percent:+.1f}" for percent in more),
        )
    return table


def main(pairs: int = 3, steps: int = 200) -> None:
    """Print both tables.

    Args:
        pairs: Trainings with and without, of each row.
        steps: Of each training.
    """
    quiet()
    console = Console(width=110)
    console.print(of_gpt2_medium())
    if pairs:
        console.print(of_demo(pairs, steps))


if __name__ == "__main__":
    auto_cli(main)
