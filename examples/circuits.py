"""Does fine-tuning strengthen the heads and neurons that mattered, or replace them? And is what a gate says what
ablation says?

    python examples/circuits.py --output circuits.png

A small transformer learns Python from the standard library; then it is tuned on English, the text of Python's own help.
Which heads and neurons matter is held against the checkpoint of the pretraining, beside more of the same text (as like
as it gets), and a model that learns English from other initial weights (as unlike). Then every head is cut off, and the
loss that this costs is held against its importance.
"""

import pydoc_data.topics
import warnings
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import rich
import torch
from jsonargparse import auto_cli
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.char_transformer import CONTEXT, CharTransformer, frequent_characters, standard_library
from examples.edge_of_stability import Curves
from examples.multifractal_training import at
from lightning_lowrank import ConcentrationMonitor, Monitor
from lightning_lowrank.monitors.concentration.inequality import rank_persistence

DEPTH, WIDTH, HEADS = 4, 64, 4
# Windows that a cut is tried on.
HELD_OUT = 256


def english() -> Tensor:
    """Windows of characters of Python's help, numbered as those of the code are."""
    index = frequent_characters()
    text = "".join(pydoc_data.topics.topics.values())
    return torch.tensor([index[character] for character in text if character in index]).unfold(0, CONTEXT + 1, CONTEXT)


def fresh(seed: int) -> CharTransformer:
    """A model that knows nothing."""
    torch.manual_seed(seed)
    return CharTransformer(100, depth=DEPTH, width=WIDTH, heads=HEADS)


def fitted(
    module: CharTransformer, text: Tensor, steps: int, checkpoint: Path, reference: Path | None = None
) -> tuple[Curves, Monitor]:
    """Trained on all but the last windows, and what the monitor saw."""
    torch.manual_seed(1)
    monitor = ConcentrationMonitor(
        ["head", "neuron"], ["gate"], max(1, min(10, steps // 3)), densities=(), reference=reference
    )
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    curves, batches = Curves(), DataLoader(TensorDataset(text[:-HELD_OUT]), 16, shuffle=True, drop_last=True)
    trainer = L.Trainer(max_steps=steps, callbacks=[monitor], logger=curves, log_every_n_steps=10, **silent)
    trainer.fit(module, batches)
    trainer.save_checkpoint(checkpoint)
    return curves, monitor


@torch.no_grad()
def loss_of(module: CharTransformer, text: Tensor) -> float:
    """On windows that it was not trained on."""
    held_out = text[-HELD_OUT:]
    return float(F.cross_entropy(module(held_out[:, :-1]).flatten(0, 1), held_out[:, 1:].flatten()))


def cuts(module: CharTransformer, text: Tensor) -> dict[str, float]:
    """What the loss rises by without each head, by the monitor's name for it."""
    whole, size, found = loss_of(module, text), WIDTH // HEADS, {}
    for block in range(DEPTH):
        for head in range(HEADS):
            without = deepcopy(module)
            with torch.no_grad():
                without.get_parameter(f"blocks.{block}.out.weight")[:, head * size : (head + 1) * size] = 0
            found[f"blocks.{block}.out.h{head}"] = loss_of(without, text) - whole
    return found


def compared(found: dict[str, Curves], losses: dict[str, float]) -> Table:
    """With the checkpoint of the pretraining, at the last sample."""
    table = Table(
        title=(
            "Importance against the pretrained checkpoint: overlap of the top fifth (Jaccard), and "
            "Spearman's correlation"
        )
    )
    for heading in ("training", "loss", "heads", "chance", "Spearman", "neurons", "chance", "Spearman"):
        table.add_column(heading, justify="left" if heading == "training" else "right", overflow="fold")
    for title, curves in found.items():
        cells = [
            f"{at(curves, f'concentration_{unit}_gate_{name}', -1):.2f}"
            for unit in ("head", "neuron")
            for name in ("overlap_reference", "overlap_chance", "rank_reference")
        ]
        table.add_row(title, f"{losses[title]:.2f}", *cells)
    return table


def of_heads(known: dict[str, tuple[dict[str, float], dict[str, float]]]) -> Table:
    """Importance and what a cut costs."""
    table = Table(title="The first head by its gate and by its cost: what the loss rises by without it")
    for heading in ("model", "Spearman", "by gate", "cost", "by cost", "cost", "median"):
        table.add_column(
            heading, justify="left" if heading in ("model", "by gate", "by cost") else "right", overflow="fold"
        )
    for title, (importance, cost) in known.items():
        heads = list(cost)
        both = [torch.tensor([row[head] for head in heads], dtype=torch.float64) for row in (importance, cost)]
        top, costliest = max(heads, key=importance.__getitem__), max(heads, key=cost.__getitem__)
        cells = [
            short(top),
            f"{cost[top]:.3f}",
            short(costliest),
            f"{cost[costliest]:.3f}",
            f"{sorted(cost.values())[len(cost) // 2]:.3f}",
        ]
        table.add_row(title, f"{float(rank_persistence(*both)):.2f}", *cells)
    return table


def short(head: str) -> str:
    """Block and number."""
    return head.replace("blocks.", "").replace(".out", "")


def draw(known: dict[str, tuple[dict[str, float], dict[str, float]]], output: Path) -> None:
    """Importance against cost, a point per head."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(known), figsize=(4.5 * len(known), 3.6), layout="constrained", squeeze=False)
    for panel, (title, (importance, cost)) in zip(axes[0], known.items(), strict=True):
        panel.scatter([importance[head] for head in cost], list(cost.values()))
        for head in cost:
            panel.annotate(short(head), (importance[head], cost[head]), fontsize=7)
        panel.set(title=title, xlabel="importance by its gate", ylabel="loss without the head, less loss")
        panel.grid(alpha=0.3)
    figure.savefig(output, dpi=110)


def main(output: Path = Path("circuits.png"), steps: int = 400) -> None:
    """Train four times, compare, and cut off heads.

    Args:
        output: Image to write.
        steps: Of each training from nothing; others take half of them.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches")
    torch.set_num_threads(1)
    code, prose, model = standard_library(), english(), fresh(0)
    found, known, losses = {}, {}, {}
    with TemporaryDirectory() as folder:
        pretrained, scratch = Path(folder, "pretrained.ckpt"), Path(folder, "other.ckpt")
        _, monitor = fitted(model, code, steps, pretrained)
        known["pretrained on code"] = importances(monitor), cuts(model, code)
        trainings = {
            "the same text": (deepcopy(model), code, steps // 2),
            "tuned on English": (deepcopy(model), prose, steps // 2),
            "English, other weights": (fresh(1), prose, steps),
        }
        for title, (module, text, count) in trainings.items():
            found[title], monitor = fitted(module, text, count, scratch, pretrained)
            losses[title] = loss_of(module, text)
            if title == "tuned on English":
                known[title] = importances(monitor), cuts(module, text)
    rich.print(compared(found, losses))
    rich.print(of_heads(known))
    draw(known, output)
    print(f"The heads are in {output}")


def importances(monitor: Monitor) -> dict[str, float]:
    """Of heads, at the last sample."""
    assert monitor.latest is not None
    return dict(monitor.latest.values["concentration_head_importance"])


if __name__ == "__main__":
    auto_cli(main)
