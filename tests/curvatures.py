"""Trainings whose curvature is known: by gradient descent on all digits at once."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lowrank import Monitor
from tests.trainings import Classifier, MemoryLogger, digits


class FullBatch(Classifier):
    """All of its data in every step, in double precision, so that a Hessian of its own can be had."""

    def __init__(self, net: nn.Module | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(
            net or nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10)),
            optimizer="sgd",
            **({"lr": 0.1} | options),
        )
        self.seen: list[list[Tensor]] = []

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(), batch_size=64)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append([p.detach().clone() for p in self.parameters()])
        return super().training_step(batch, batch_idx)


def watched(module: L.LightningModule, monitor: Monitor, **options: Any) -> MemoryLogger:
    logger = MemoryLogger()
    silent: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 3,
    }
    torch.manual_seed(0)
    L.Trainer(**(silent | options), logger=logger, callbacks=[monitor]).fit(module)
    return logger
