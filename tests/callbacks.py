"""Callbacks that run a step again, or differentiate its loss twice, in the training that they watch."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_lowrank.loss.replay import Replay
from lightning_lowrank.watching.trainer import TrainerTraining


def curvature(loss: Tensor, module: nn.Module) -> Tensor:
    """Of the loss along its gradient: a double backward through everything."""
    params = [p for p in module.parameters() if p.requires_grad]
    keep = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    gradient = torch.autograd.grad(loss, params, **keep)
    along = [g.detach() for g in gradient]
    depends = [(g, a) for g, a in zip(gradient, along, strict=True) if g.requires_grad]
    if not depends:
        return loss.new_zeros(())
    # The graph of the loss is still wanted where it is the user's.
    keep = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    product = torch.autograd.grad([g for g, _ in depends], params, [a for _, a in depends], **keep)
    return sum((h * a).sum() for h, a in zip(product, along, strict=True))  # type: ignore[return-value]


class Replaying(L.Callback):
    """Runs the first batch again after some steps, and differentiates its loss twice."""

    def __init__(self, every: int = 1, **options: Any) -> None:
        self.replay, self.every = Replay(**options), every
        self.losses: list[float] = []
        self.curvatures: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.replay.batch is None:
            self.replay.keep(batch, batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.every:
            return
        with self.replay(TrainerTraining(trainer, pl_module)) as seen:
            self.losses.append(seen.loss.item())
            self.curvatures.append(curvature(seen.loss, pl_module).item())


class Inline(L.Callback):
    """Differentiates the live loss twice before each backward pass."""

    def __init__(self) -> None:
        self.curvatures: list[float] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.curvatures.append(curvature(loss, pl_module).item())
