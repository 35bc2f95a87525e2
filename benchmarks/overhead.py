"""What watching costs: trainings with `RankMonitor` and without, in turns, in one run, on one thread.

    python -m benchmarks.overhead --pairs 3

Times of whole trainings are as noisy as the machine. The monitor's own clock counts only what was its own, and is what
the limits are for. "Slowest step": each step of a cadence by its median over the samples after the first, the slowest
of them in parts of the median step.
"""

import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import Monitor, RankMonitor

EVERY_STEP: dict[str, Any] = {"sources": ("gradients",), "every_n_steps": 1}


@dataclass(frozen=True)
class Case:
    """One row: how the monitor is made, on what batch, for how many steps, and what it may cost."""

    what: str
    options: dict[str, Any]
    batch_size: int
    steps: int
    limit: str
    whole_products: bool = False


CASES = [
    Case("RankMonitor()", {}, 32, 200, "0.6 %"),
    Case("RankMonitor(), whole Gram products", {}, 32, 200, "", whole_products=True),
    Case("gradients, every step", EVERY_STEP, 32, 30, "25 %"),
    Case("RankMonitor()", {}, 8, 300, "2 %"),
    Case("RankMonitor(), whole Gram products", {}, 8, 300, "", whole_products=True),
    Case("RankMonitor(spread=4)", {"spread": 4}, 8, 300, "slowest 1.5"),
    Case("gradients, every step", EVERY_STEP, 8, 50, ""),
]


class Steps(L.Callback):
    """When each step was over."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Look at the clock."""
        self.ends.append(time.perf_counter())

    def slowest(self, every: int) -> float:
        """The slowest step of a cadence, by medians over its samples after the first, in parts of the median step."""
        taken = [end - begin for begin, end in pairwise(self.ends)][every - 1 :]
        return max(median(taken[place::every]) for place in range(min(every, len(taken)))) / median(taken)


@contextmanager
def products(*, whole: bool) -> Iterator[None]:
    """Gram products whole, as they were until November 2026, or as they are."""
    spectrum: Any = import_module("lightning_lowrank.maths.spectra.spectrum")
    usual = spectrum.SMALL
    spectrum.SMALL = sys.maxsize if whole else usual
    try:
        yield
    finally:
        spectrum.SMALL = usual


def seconds(
    windows: TensorDataset, batch_size: int, steps: int, monitor: Monitor | None, watch: L.Callback | None = None
) -> float:
    """Time of one training of the demo's model, loggers included."""
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps,
            callbacks=[callback for callback in (monitor, watch or Steps()) if callback],
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        model, batches = CharTransformer(vocabulary=100), DataLoader(windows, batch_size, drop_last=True)
        begin = time.perf_counter()
        trainer.fit(model, batches)
        return time.perf_counter() - begin


def row(windows: TensorDataset, case: Case, pairs: int) -> list[str]:
    """Milliseconds per step without and with, what that is more, and what the monitor's own clock says."""
    without: list[float] = []
    watched: list[float] = []
    clock: list[float] = []
    slowest: list[float] = []
    run = partial(seconds, windows, case.batch_size, case.steps)
    for pair in range(pairs):
        monitor, steps = RankMonitor(**case.options), Steps()
        # First one goes first, then the other: what drifts cancels.
        with products(whole=case.whole_products):
            for one in (None, monitor) if pair % 2 else (monitor, None):
                (watched if one else without).append(run(one, steps if one else None))
        clock.append(monitor.overhead)
        slowest.append(steps.slowest(case.options.get("every_n_steps", 50)))
    more = sorted(100 * (with_it / plain - 1) for with_it, plain in zip(watched, without, strict=True))
    times = [f"{1000 * median(of) / case.steps:.1f}" for of in (without, watched)]
    extra = f"{median(more):+.1f} ({more[0]:+.1f} to {more[-1]:+.1f})"
    own = f"{median(clock):.2f} ({min(clock):.2f} to {max(clock):.2f})"
    return [case.what, f"{case.batch_size} x 64", *times, extra, own, f"{median(slowest):.2f}", case.limit]


def peak_memory(options: dict[str, Any] | None) -> float:
    """Most MiB that a process of its own held while it trained for 3 steps; Linux."""
    quiet()
    windows = TensorDataset(standard_library()[:96])
    seconds(windows, 32, 3, None if options is None else RankMonitor(**options))
    # Not `ru_maxrss`: that of a child begins at its parent's.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def extra_memory(options: dict[str, Any]) -> float:
    """MiB that a training with a monitor holds at its peak beyond one without."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        plain, watched = pool.map(peak_memory, [None, options])
    return watched - plain


def import_time() -> float:
    """Milliseconds of `import lightning_lowrank` in a new process, the best of 5."""
    timed = "import time; begin = time.perf_counter(); import lightning_lowrank; print(time.perf_counter() - begin)"
    code = f"{timed}; import sys; assert 'torch' not in sys.modules"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(5)
    ]
    return 1000 * min(map(float, runs))


def quiet() -> None:
    """One thread, and no messages of the Trainer."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def main(pairs: int = 3, only: str = "") -> None:
    """Print the table.

    Args:
        pairs: Trainings with and without, of each row.
        only: Rows whose batch and monitor, as in "8 x 64 RankMonitor()", have this in them, and nothing else.
    """
    quiet()
    windows = TensorDataset(standard_library())
    seconds(windows, 32, 10, RankMonitor())  # warms up

    table = Table(title=f"Cost of watching the demo's model, one thread, {pairs} pairs of trainings a row")
    headings = ("monitor", "batch", "ms a step", "watched", "more, % (range)", "own clock, %", "slowest step", "limit")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "monitor" else "right")
    for case in (case for case in CASES if only in f"{case.batch_size} x 64 {case.what}"):
        table.add_row(*row(windows, case, pairs))
    console = Console(width=140)
    console.print(table)
    if only:
        return

    rest = Table("also", "value", "limit")
    rest.add_row("peak memory beyond the same training without: RankMonitor()", f"{extra_memory({}):.0f} MiB", "")
    rest.add_row("the same, gradients at every step", f"{extra_memory(EVERY_STEP):.0f} MiB", "")
    rest.add_row("import lightning_lowrank, without torch", f"{import_time():.0f} ms", "50 ms")
    console.print(rest)


if __name__ == "__main__":
    auto_cli(main)
