"""Dormant units in real trainings. Oracle: activations computed by hand on the same batches, in numpy."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_lowrank import DormantUnitsMonitor, Monitor
from tests.processes import together
from tests.trainings import Classifier, InOrder, MemoryLogger, digits

QUIET: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def mlp() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 10))
    with torch.no_grad():
        net[0].bias[:5] = -100  # silent on every input
    return net


def watched(module: L.LightningModule, monitor: Monitor, **options: Any) -> MemoryLogger:
    logger = MemoryLogger()
    L.Trainer(logger=logger, callbacks=[monitor], **QUIET, **{"max_steps": 3, **options}).fit(module)
    return logger


def expected(net: nn.Sequential, rows: Tensor, upto: int) -> tuple[float, float]:
    with torch.no_grad():
        out = np.abs(net[:upto](rows).numpy().astype(np.float64))
    means = out.mean(0)
    return float(np.mean(means / means.mean() <= 0.025)), float(np.mean(out.max(0) == 0))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_shares_are_those_of_the_activations(accumulate: int) -> None:
    torch.manual_seed(0)
    net = mlp()
    shares = [expected(net, digits()[: 16 * accumulate][0], upto) for upto in (2, 4)]
    monitor = DormantUnitsMonitor(every_n_steps=10)
    watched(InOrder(0, 1, net), monitor, accumulate_grad_batches=accumulate)
    assert monitor.first is not None
    found = monitor.first.values

    for layer, (dormant, inactive) in zip(("net.1", "net.3"), shares, strict=True):
        assert found["dormant_share"][layer] == pytest.approx(dormant)
        assert found["dormant_inactive"][layer] == pytest.approx(inactive)
    assert found["dormant_inactive"]["net.1"] >= 5 / 20


def test_units_of_images_are_channels() -> None:
    net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    with torch.no_grad():
        net[1].bias[:2] = -100
    monitor = DormantUnitsMonitor(every_n_steps=1)
    watched(Classifier(net), monitor)
    assert monitor.latest is not None

    assert monitor.failures == 0
    assert monitor.latest.values["dormant_inactive"]["net.2"] == pytest.approx(2 / 6)


def test_a_layer_that_dies_is_told() -> None:
    net = mlp()
    with torch.no_grad():
        net[0].bias[:] = -100
    monitor = DormantUnitsMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match=r"dormant_inactive at 1 of 2 sites"):
        watched(Classifier(net), monitor, max_steps=30, max_epochs=10)

    assert monitor.latest is not None
    assert monitor.latest.values["dormant_share"]["net.1"] == 1


def test_a_model_without_activation_modules_says_what_to_match() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 20), nn.Linear(20, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)))

    with pytest.raises(ValueError, match=r"Match the layers whose outputs are units. Layers: \['net', 'net.one'"):
        watched(Classifier(Functional()), DormantUnitsMonitor())


@pytest.mark.parametrize("tau", [-0.1, 1.0, float("nan")])
def test_a_tau_that_is_no_share_is_refused(tau: Any) -> None:
    with pytest.raises(ValueError, match="tau="):
        DormantUnitsMonitor(tau=tau)


def in_parallel(rank: int, size: int, root: Path) -> Any:
    torch.manual_seed(0)
    monitor = DormantUnitsMonitor(every_n_steps=2)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": size, "strategy": "ddp"} if size > 1 else {}
    watched(InOrder(rank, size, mlp()), monitor, **options)
    return monitor.first and monitor.first.values


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    first, second = together(in_parallel, tmp_path)
    (alone,) = together(in_parallel, tmp_path, 1)

    assert first == second
    for quantity, row in alone.items():
        assert first[quantity] == pytest.approx(row)
