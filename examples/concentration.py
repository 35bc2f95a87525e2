"""Does learning concentrate? A transformer and an MLP, beside the same trainings with nothing but frequencies to learn.

    python examples/concentration.py --output concentration.png

It is said that in training few modules, heads and neurons come to carry most of the learning, and that those that have
get more. Here are the Gini coefficient of each signal at the start and at the end, how what is large grows, and whether
the same units stay large. In the null the characters of the text, or the labels of the digits, are shuffled: all that
is left to learn is how frequent they are.
"""

import warnings
from math import isfinite, nan
from pathlib import Path
from statistics import fmean, median
from typing import Any

import lightning as L
import rich
import torch
from jsonargparse import auto_cli
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from examples.char_transformer import CharTransformer, standard_library
from examples.edge_of_stability import Curves
from examples.multifractal_training import Case, digits, perceptron
from lightning_lowrank import ConcentrationMonitor

SIGNALS = (
    "module_gradient",
    "module_update",
    "head_gradient",
    "head_update",
    "head_gate",
    "neuron_gradient",
    "neuron_update",
    "neuron_gate",
)
WEIGHTS = (
    "weight_gini",
    "weight_sparsity_0.99",
    "mask_hamming_start_0.1",
    "mask_jaccard_start_0.1",
    "mask_early_bird_0.5",
)
RUNS = ("trained", "null")


def text() -> TensorDataset:
    """Windows of characters."""
    return TensorDataset(standard_library())


CASES = [
    Case("character transformer", lambda: CharTransformer(100, depth=2, width=64), text, 16, 480),
    Case("digits, MLP", perceptron, digits, 64, 600),
]


def meaningless(data: TensorDataset) -> TensorDataset:
    """The same frequencies, and nothing else: what is predicted is shuffled over all examples."""
    *inputs, last = data.tensors
    draws = torch.Generator().manual_seed(0)
    return TensorDataset(*inputs, last.flatten()[torch.randperm(last.numel(), generator=draws)].view(last.shape))


def trained(case: Case, run: str, seed: int, share: float) -> Curves:
    """What a training showed, at thirteen steps."""
    L.seed_everything(seed, verbose=False)
    steps = max(12, int(share * case.max_steps))
    data = case.data() if run == "trained" else meaningless(case.data())
    monitor, curves = ConcentrationMonitor(every_n_steps=steps // 12, detail="all", seed=seed), Curves()
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    batches = DataLoader(data, case.batch_size, shuffle=True, drop_last=True)
    # One step more: the last sample is of the weights that all others made.
    L.Trainer(max_steps=steps + 1, callbacks=[monitor], logger=curves, log_every_n_steps=10, **silent).fit(
        case.make(), batches
    )
    return curves


def known(curves: Curves, tag: str) -> list[float]:
    """Values that are numbers."""
    return [value for value in curves.points.get(f"concentration/{tag}", {}).values() if isfinite(value)]


def end(values: list[float]) -> float:
    """Median of the last three samples: each is of one batch."""
    return median(values[-3:]) if values else nan


def changes(runs: list[Curves], tag: str) -> str:
    """First and last, and the range of what they differ by over the seeds."""
    values = [known(curves, tag) for curves in runs]
    if not all(values):
        return ""
    moved = [end(row) - row[0] for row in values]
    return (
        f"{fmean(row[0] for row in values):.2f} -> {fmean(map(end, values)):.2f} ({min(moved):+.2f} "
        f"to {max(moved):+.2f})"
    )


def later(runs: list[Curves], tag: str) -> str:
    """Mean over the second half of the samples."""
    values = [fmean(row[len(row) // 2 :]) for curves in runs if (row := known(curves, tag))]
    return f"{fmean(values):.2f}" if values else ""


def inequality(found: dict[str, dict[str, list[Curves]]]) -> Table:
    """Of every signal."""
    table = Table(
        title=(
            "Gini coefficient, first -> end (change, over seeds); slope and persistence, mean of the "
            "second half of training"
        )
    )
    for heading in ("training", "signal", "n", "Gini, trained", "Gini, null", "slope", "null", "persistence", "null"):
        table.add_column(heading, justify="left" if heading in ("training", "signal") else "right", overflow="fold")
    for title, runs in found.items():
        for signal in SIGNALS:
            ginis = [changes(runs[run], f"{signal}_gini") for run in RUNS]
            if any(ginis):
                count = known(runs["trained"][0], f"{signal.partition('_')[0]}_count")[0]
                rest = [
                    later(runs[run], f"{signal}_{name}")
                    for name in ("matthew_slope", "rank_persistence")
                    for run in RUNS
                ]
                table.add_row(title, signal, f"{count:.0f}", *ginis, *rest)
    return table


def of_weights(found: dict[str, dict[str, list[Curves]]]) -> Table:
    """Of the weights and their masks."""
    table = Table(title="Weights and masks, first -> end")
    for heading in ("training", "what", "trained", "null"):
        table.add_column(heading, justify="left" if heading in ("training", "what") else "right", overflow="fold")
    for title, runs in found.items():
        for run in RUNS:
            losses = [list(curves.points["loss"].values()) for curves in runs[run]]
            print(f"{title}, {run}: loss {fmean(row[0] for row in losses):.2f} -> {fmean(map(end, losses)):.2f}")
        for tag in WEIGHTS:
            table.add_row(title, tag, *(changes(runs[run], tag) for run in RUNS))
    return table


def draw(found: dict[str, dict[str, list[Curves]]], output: Path) -> None:
    """One panel per training and kind of unit that it has; the null is dashed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(found), 3, figsize=(12, 3.4 * len(found)), layout="constrained", squeeze=False)
    colours = {"gradient": "tab:blue", "update": "tab:orange", "gate": "tab:green"}
    for row, (title, runs) in zip(axes, found.items(), strict=True):
        for panel, unit in zip(row, ("module", "head", "neuron"), strict=True):
            signals = [name for name in SIGNALS if name.startswith(unit) and known(runs["trained"][0], f"{name}_gini")]
            panel.set_visible(bool(signals))
            for signal in signals:
                for run, style in zip(RUNS, ("-", ":"), strict=True):
                    points = [curves.points.get(f"concentration/{signal}_gini", {}) for curves in runs[run]]
                    what = signal.partition("_")[2]
                    averages = [fmean(each[step] for each in points) for step in points[0]]
                    panel.plot(list(points[0]), averages, style, color=colours[what], label=f"{what}, {run}")
            panel.set(title=f"{title}: {unit}s", xlabel="optimizer step", ylim=(0, 1))
            panel.grid(alpha=0.3)
        row[0].set_ylabel("Gini coefficient")
    axes[0, 1].legend(fontsize=7)
    figure.savefig(output, dpi=110)


def main(output: Path = Path("concentration.png"), share: float = 1.0, seeds: int = 2) -> None:
    """Train each case with and without meaning, say what became unequal, and draw it.

    Args:
        output: Image to write.
        share: Of the steps.
        seeds: Trainings of each.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches")
    torch.set_num_threads(1)
    rich.reconfigure(width=max(160, rich.get_console().width))  # nine columns
    found = {
        case.title: {run: [trained(case, run, seed, share) for seed in range(seeds)] for run in RUNS} for case in CASES
    }
    rich.print(inequality(found))
    rich.print(of_weights(found))
    draw(found, output)
    print(f"The curves are in {output}")


if __name__ == "__main__":
    auto_cli(main)
