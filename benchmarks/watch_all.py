"""What `watch_all()` takes: by how much all monitors make training longer, and who was there.

python -m benchmarks.watch_all
"""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from jsonargparse import auto_cli
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.faults.nets import Convolutions, gpt, mlp
from benchmarks.faults.page import table
from benchmarks.faults.recording import Memory
from benchmarks.faults.trainings import Run, characters, classes
from benchmarks.overhead import quiet
from lightning_lowrank import Monitor, watch_all

# Trainings with their batch size and number of steps.
TRAININGS: dict[str, tuple[Callable[[], Run], int, int]] = {
    "digits MLP, 64": (lambda: Run(mlp(), classes), 64, 200),
    "digits MLP, 64, long": (lambda: Run(mlp(), classes), 64, 4000),
    "conv net on digits, 64": (lambda: Run(Convolutions(), classes), 64, 1500),
    "GPT of width 64, 8 x 64": (lambda: Run(gpt(), characters), 8, 200),
    "GPT of width 64, 8 x 64, long": (lambda: Run(gpt(), characters), 8, 800),
}


class Halves(L.Callback):
    """Seconds of all monitors and of training, at the middle and at the end.

    Args:
        monitors: Of the run.
    """

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self.clocks = [monitor.watch.journal.clock for monitor in monitors]
        self.spent = [(0.0, 0.0)]

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Note them."""
        if trainer.global_step * 2 in (trainer.max_steps, 2 * trainer.max_steps):
            self.spent.append((sum(clock.own for clock in self.clocks), self.clocks[0].total))

    def percent(self, begin: int) -> float:
        """By how much training took longer since the first or the second of three moments."""
        own, total = (b - a for a, b in zip(self.spent[begin], self.spent[-1], strict=True))
        return 100 * own / (total - own)


def row(name: str, max_overhead: float) -> list[str]:
    """One training."""
    make, size, steps = TRAININGS[name]
    L.seed_everything(0, verbose=False)
    run, memory, monitors = make(), Memory(), watch_all(max_overhead)
    batches = DataLoader(run.data, size, sampler=RandomSampler(run.data, num_samples=steps * size))
    silent: dict[str, Any] = dict.fromkeys(
        ("enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
    )
    halves = Halves(monitors)
    L.Trainer(**silent, logger=memory, max_steps=steps, callbacks=[*monitors, halves]).fit(run, batches)
    at_work = {m.label: m for m in monitors if m.latest is not None}
    samples = {label: len(memory.curves.get(f"lowrank/{label}_failures", {})) for label in at_work}
    counted = ", ".join(f"{label} {count}" for label, count in samples.items())
    missing = ", ".join(m.label for m in monitors if m.latest is None)
    return [name, str(steps), f"{halves.percent(0):.1f}", f"{halves.percent(1):.1f}", counted, missing]


def main(max_overhead: float = 0.05) -> None:
    """Print the table.

    Args:
        max_overhead: Of all monitors together.
    """
    quiet()
    headings = ["training", "steps", "% of the whole run", "% of its second half", "samples", "left out"]
    print(table(headings, [row(name, max_overhead) for name in TRAININGS]))


if __name__ == "__main__":
    auto_cli(main)
