"""What a sample of `GradientAnatomyMonitor` and of `ConcentrationMonitor` costs in two trainings, processor time of one
thread.

Without a logger: what writing takes is not in it.

python -m benchmarks.gradients [--samples 6]
"""

import argparse
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples.char_transformer import CharTransformer, standard_library
from examples.gradient_anatomy import Classifier, digits
from lightning_lowrank import ConcentrationMonitor, GradientAnatomyMonitor
from lightning_lowrank.watching.monitor import Monitor

MONITORS: dict[str, tuple[Callable[..., Monitor], int, dict[str, Any]]] = {
    "anatomy": (GradientAnatomyMonitor, 1000, {}),
    "anatomy, max_rows=512": (GradientAnatomyMonitor, 1000, {"max_rows": 512}),
    "concentration": (ConcentrationMonitor, 200, {}),
    "concentration, no updates, no masks": (
        ConcentrationMonitor,
        200,
        {"signals": ["gradient", "gate"], "densities": []},
    ),
}


class Clock(L.Callback):
    """Processor time when each batch begins, before the monitor."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun.append(time.process_time())


def row(
    training: str, module: L.LightningModule, batches: DataLoader[Any], watcher: str, samples: int
) -> tuple[str, ...]:
    """What a sample takes, by the steps in which one is due and those in which none is, and its share at the default
    cadence.
    """
    monitor, every, options = MONITORS[watcher]
    clock = Clock()
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
    }
    callbacks = [clock, monitor(every_n_steps=2, **options)]
    L.Trainer(max_steps=2 * samples + 3, callbacks=callbacks, accelerator="cpu", **silent).fit(module, batches)
    # The first sample builds what later ones have.
    taken = [after - before for before, after in pairwise(clock.begun)][2:]
    plain = median(taken[1::2])
    sample = median(taken[::2]) - plain
    milliseconds = f"{1000 * plain:.1f}", f"{1000 * sample:.0f}"
    return training, watcher, *milliseconds, str(every), f"{sample / (sample + every * plain):.1%}"


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--samples", type=int, default=6)
    samples = options.parse_args().samples
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    text, images = TensorDataset(standard_library()), digits()
    columns = ["training", "monitor", "a step, ms", "a sample, ms", "default cadence", "share"]
    table = Table(*columns, title="Cost of watching gradients, processor time of one thread")
    for training in ("transformer, 32 x 64", "digits MLP, 256"):
        for watcher in MONITORS:
            L.seed_everything(0, verbose=False)
            is_text = training.startswith("transformer")
            module = CharTransformer(vocabulary=100) if is_text else Classifier(64, 10, nn.GELU)
            batches = DataLoader(text if is_text else images, 32 if is_text else 256, shuffle=True, drop_last=True)
            table.add_row(*row(training, module, batches, watcher, samples))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
