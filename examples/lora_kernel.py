"""Is fine-tuning lazy? The tangent kernel of the tuned part of MiniLM, with LoRA and without, while it learns what
docstrings are of.

    python examples/lora_kernel.py --output lora_kernel.png

Where a kernel stays what it was, training is a linear model of the features that were there (Malladi et al. 2023, arXiv
2210.05643). Here it is that of LoRA factors at the last two layers, and that of these layers where they are tuned
themselves.
"""

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import rich
import torch
from jsonargparse import auto_cli
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch.utils.data import DataLoader

from examples.edge_of_stability import Curves
from examples.fine_tuning import LAYERS, Sorter, docstring_tokens
from lightning_lowrank import NTKMonitor

TAGS = {
    "ntk/velocity": "velocity",
    "ntk/distance_to_start": "distance to start",
    "ntk/centred_label_alignment": "alignment with labels",
}


def sorter(rate: float, *, lora: bool) -> L.LightningModule:
    """MiniLM with its last two layers to be tuned, or with factors of rank 8 at their queries and values."""
    module = Sorter(partial(torch.optim.AdamW, lr=rate))
    if lora:
        last = list(range(len(module.minilm.encoder.layer)))[-LAYERS:]
        config = LoraConfig(r=8, target_modules=["query", "value"], lora_alpha=16, layers_to_transform=last)
        module.minilm = get_peft_model(module.minilm, config)
    return module


CASES = {
    "LoRA, 0.0003": (partial(sorter, 3e-4, lora=True), "*lora*"),
    "LoRA, 0.003": (partial(sorter, 3e-3, lora=True), "*lora*"),
    "last two layers, 0.0001": (partial(sorter, 1e-4, lora=False), "minilm.*"),
}


def tuned(name: str, steps: int, every: int, num_examples: int) -> Curves:
    """What a fine-tuning showed."""
    L.seed_everything(0, verbose=False)
    make, match = CASES[name]
    monitor = NTKMonitor(
        match, kernel="sum_of_logits", num_examples=num_examples, every_n_steps=every, detail="standard"
    )
    batches = DataLoader(docstring_tokens(48), num_examples, shuffle=True, drop_last=True)
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    curves = Curves()
    L.Trainer(max_steps=steps, callbacks=[monitor], logger=curves, log_every_n_steps=1, **silent).fit(make(), batches)
    return curves


def share_of_first_factors(curves: Curves, step: int) -> float:
    """Part of the kernel that the factors A carry, next to the input: nothing while B is 0."""
    shares = [
        points[step] for tag, points in curves.points.items() if tag.startswith("ntk_layer_share/") and "lora_A" in tag
    ]
    return sum(shares) if shares else math.nan


def draw(found: dict[str, Curves], output: Path) -> None:
    """One panel per quantity."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(TAGS), figsize=(4.2 * len(TAGS), 3.4))
    for panel, (tag, label) in zip(panels, TAGS.items(), strict=True):
        for title, curves in found.items():
            panel.plot(*curves.curve(tag), "o-", label=title)
        panel.set(title=label, xlabel="step")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def main(output: Path = Path("lora_kernel.png"), steps: int = 61, every: int = 20, num_examples: int = 16) -> None:
    """Fine-tune three times and print the table.

    Args:
        output: Image to write.
        steps: Of each.
        every: Cadence of samples.
        num_examples: Docstrings of a batch, and of the kernel.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*number of training batches")
    torch.set_num_threads(1)
    found = {name: tuned(name, steps, every, num_examples) for name in CASES}
    table = Table(title=f"The kernel of {num_examples} docstrings, for the sum of the logits")
    for heading in ("tuned", "step", "loss", *TAGS.values(), "share of the factors A"):
        table.add_column(heading, justify="right", overflow="fold")
    for name, curves in found.items():
        for step in curves.points["ntk/trace"]:
            values = [curves.points[tag].get(step, math.nan) for tag in TAGS]
            cells = [
                "-" if math.isnan(value) else f"{value:.2g}"
                for value in (*values, share_of_first_factors(curves, step))
            ]
            table.add_row(name, str(step), f"{curves.points['loss'][step]:.2f}", *cells)
    rich.print(table)
    draw(found, output)
    print(f"The curves are in {output}")


if __name__ == "__main__":
    auto_cli(main)
