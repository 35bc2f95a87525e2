"""Losses and norms of gradients of real trainings. Oracle: numpy on what the module itself keeps."""

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_lowrank import LossMonitor, SpikeAlert
from tests.trainings import QUIET, Classifier, MemoryLogger


class Noting(Classifier):
    """Keeps the norm of the gradient of each step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(
            float(np.sqrt(sum(np.square(p.grad.numpy()).sum() for p in self.parameters() if p.grad is not None)))
        )


def curves(module: L.LightningModule, monitor: LossMonitor, **options: Any) -> dict[str, dict[int, float]]:
    logger = MemoryLogger()
    L.seed_everything(0, verbose=False)
    L.Trainer(**QUIET | {"max_steps": 6, "accelerator": "cpu", "logger": logger} | options, callbacks=[monitor]).fit(
        module
    )
    return logger.curves()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_loss_and_norm_are_those_of_the_step_before_clipping(accumulate: int, clip: float | None) -> None:
    module = Noting()

    logged = curves(module, LossMonitor(), accumulate_grad_batches=accumulate, gradient_clip_val=clip, max_steps=3)

    losses = np.array(module.losses).reshape(3, accumulate).mean(1)
    assert_close(list(logged["step/loss"].values()), losses.tolist(), rtol=1e-5, atol=0.0)
    assert_close(list(logged["step/gradient_norm"].values()), module.norms, rtol=1e-5, atol=0.0)


def test_a_spike_of_the_loss_is_told() -> None:
    class Spiking(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * 100 if self.global_step == 40 else loss

    monitor = LossMonitor(alerts=[SpikeAlert("step_loss", window=20, warm_up_samples=20)])
    with pytest.warns(UserWarning, match="step_loss"):
        curves(Spiking(lr=1e-4), monitor, max_steps=45, max_epochs=-1)

    assert [event.step for event in monitor.events if event.state == "firing"] == [40]


def test_the_default_rules_are_on_the_loss() -> None:
    assert {rule.quantity for rule in LossMonitor.usual_alerts(["step_loss", "step_gradient_norm"])} == {"step_loss"}
