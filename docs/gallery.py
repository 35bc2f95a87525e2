"""Train what the gallery shows: event files in `docs/gallery/runs`, of which `docs.site` makes the report.

    python -m docs.gallery

Two trainings of the demo's transformer and one of a digits MLP, about two minutes on one processor.
"""

import shutil
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from docs.images.draw_tab import Transformer
from examples.char_transformer import standard_library
from lightning_lowrank import watch_all

RUNS = Path(__file__).parent / "gallery" / "runs"


class DigitsMLP(L.LightningModule):
    """Two hidden layers; with a large bias below zero most units of the first never fire."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        first = torch.nn.Linear(64, 128)
        torch.nn.init.constant_(first.bias, bias)
        hidden = [torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(first, *hidden, torch.nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def digits() -> DataLoader[tuple[torch.Tensor, ...]]:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    return DataLoader(data, 128, shuffle=True, drop_last=True)


def text() -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(standard_library()), 16, shuffle=True, drop_last=True)


TRAININGS = {
    "healthy": (lambda: Transformer(3e-3), text),
    "diverged": (lambda: Transformer(1.0), text),
    "dead-units": (lambda: DigitsMLP(-3.0), digits),
}


def main(max_steps: int = 300) -> None:
    """Train each, watched by all monitors under one budget."""
    shutil.rmtree(RUNS, ignore_errors=True)
    for name, (model, batches) in TRAININGS.items():
        L.seed_everything(0, verbose=False)
        logger = TensorBoardLogger(RUNS.parent, RUNS.name, version=name)
        options = {"max_steps": max_steps, "logger": logger, "enable_checkpointing": False}
        L.Trainer(accelerator="cpu", callbacks=[*watch_all()], **options).fit(model(), batches())


if __name__ == "__main__":
    main()
