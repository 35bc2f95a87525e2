"""Which way to begin LoRA? Real MiniLM weights learn which package a docstring is of, with three inits.

    python examples/lora.py --output lora.png

Beside the loss: how many directions the products use of the eight that they have, and how many of the top directions of
the adapted weights are near none of the pretrained ones.
"""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import rich
import torch
from jsonargparse import auto_cli
from rich.table import Table
from torch.utils.data import DataLoader

from examples.edge_of_stability import Curves
from examples.fine_tuning import Sorter, docstring_tokens
from lightning_lowrank import LoRA

INITS = ("default", "pissa", "olora")
QUANTITIES = ("stable_rank", "utilisation", "update_rank", "update_norm", "intruders")


def tuned(init: str, steps: int, every: int, rate: float, batch_size: int) -> Curves:
    """What a fine-tuning of queries and values showed."""
    L.seed_everything(0, verbose=False)
    lora = LoRA(8, init=init, match=["*query.weight", "*value.weight"], every_n_steps=every, intruders=10, detail="all")
    batches = DataLoader(docstring_tokens(48), batch_size, shuffle=True, drop_last=True)
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    curves, module = Curves(), Sorter(partial(torch.optim.AdamW, lr=rate))
    L.Trainer(max_steps=steps, callbacks=[lora], logger=curves, log_every_n_steps=1, **silent).fit(module, batches)
    lora.merge(module)
    return curves


def draw(found: dict[str, Curves], output: Path) -> None:
    """One panel per quantity."""
    import matplotlib.pyplot as plt

    tags = ["loss", *(f"lora/{name}_median" for name in QUANTITIES)]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for ax, tag in zip(axes.flat, tags, strict=True):
        for init, curves in found.items():
            ax.plot(*curves.curve(tag), label=init)
        ax.set(title=tag, xlabel="step")
    axes[0, 0].legend()
    figure.savefig(output, dpi=110)


def main(
    output: Path = Path("lora.png"), steps: int = 61, every: int = 20, rate: float = 1e-3, batch_size: int = 16
) -> None:
    """Fine-tune with each init and print the table.

    Args:
        output: Image to write.
        steps: Of each.
        every: Cadence of samples.
        rate: Learning rate.
        batch_size: Docstrings of a batch.
    """
    torch.set_num_threads(1)
    found = {init: tuned(init, steps, every, rate, batch_size) for init in INITS}
    table = Table(title="Queries and values of MiniLM, rank 8: medians over pairs")
    for heading in ("init", "step", "loss", *QUANTITIES):
        table.add_column(heading, justify="right", overflow="fold")
    for init, curves in found.items():
        for step in list(curves.points["lora/stable_rank_median"]):
            values = [f"{curves.points[f'lora/{name}_median'][step]:.3g}" for name in QUANTITIES]
            table.add_row(init, str(step), f"{curves.points['loss'][step]:.2f}", *values)
    rich.print(table)
    draw(found, output)
    print(f"The curves are in {output}")


if __name__ == "__main__":
    auto_cli(main)
