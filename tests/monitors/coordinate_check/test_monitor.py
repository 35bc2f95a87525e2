"""What a step changes in linear layers, in real trainings. Oracle: inputs from the layers below and weights before and
after the step, multiplied in numpy.
"""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lowrank import CoordinateCheckMonitor, Monitor
from tests.processes import together
from tests.trainings import QUIET, Classifier, InOrder, MemoryLogger, digits

Sites = dict[str, dict[str, float]]


def net(transposed: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = Conv1D(12, 20) if transposed else nn.Linear(20, 12)
    return nn.Sequential(nn.Linear(64, 20), nn.Tanh(), hidden, nn.Tanh(), nn.Linear(12, 10))


def watched(module: L.LightningModule, monitor: Monitor, **options: Any) -> Monitor:
    given = {"max_steps": 1, "logger": MemoryLogger()} | options
    L.Trainer(**QUIET, callbacks=[monitor], accelerator="cpu", **given).fit(module)
    return monitor


def array(tensor: Any) -> np.ndarray:
    values: np.ndarray = tensor.detach().double().numpy()
    return values


def expected(before: nn.Sequential, after: nn.Sequential, rows: Any) -> Sites:
    found: Sites = {"coordinate_change": {}, "coordinate_change_chance": {}, "coordinate_size": {}}
    for i in (0, 2, 4):
        x = array(before[:i](rows))
        old, new = (array(of[i].weight) for of in (before, after))
        if isinstance(before[i], nn.Linear):
            old, new = old.T, new.T
        output, change = x @ old, x @ (new - old)
        # Uncorrelated with the inputs: the mean over all rotations of the inputs.
        chance = np.linalg.norm(new - old) * np.linalg.norm(x) / np.sqrt(x.shape[1])
        found["coordinate_change"][f"net.{i}"] = np.linalg.norm(change) / np.linalg.norm(output)
        found["coordinate_change_chance"][f"net.{i}"] = chance / np.linalg.norm(output)
        found["coordinate_size"][f"net.{i}"] = np.sqrt((output**2).mean())
    return found


def assert_is(monitor: Monitor, truth: Sites, rel: float = 1e-4) -> None:
    assert monitor.first is not None and monitor.failures == 0
    assert {name: dict(monitor.first.values[name]) for name in truth} == {
        name: pytest.approx(row, rel=rel) for name, row in truth.items()
    }


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_numbers_are_those_of_inputs_and_weights(accumulate: int, transposed: bool) -> None:
    module = InOrder(0, 1, net(transposed))
    monitor = watched(module, CoordinateCheckMonitor(1), accumulate_grad_batches=accumulate)

    assert_is(monitor, expected(net(transposed), module.net, digits()[: 16 * accumulate][0]))


def test_rows_are_spread_evenly_over_a_call() -> None:
    module = InOrder(0, 1, net())
    monitor = watched(module, CoordinateCheckMonitor(1, num_rows=4))

    assert_is(monitor, expected(net(), module.net, digits()[:16:4][0]))


def test_an_update_that_knows_nothing_of_the_inputs_is_as_chance_has_it() -> None:
    """Noise in the place of a gradient, 200 times as many entries as rows."""

    class Noise(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            closure()
            for p in self.param_groups[0]["params"]:
                p.data += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))

    class Noisy(InOrder):
        def configure_optimizers(self) -> Any:
            return Noise(self.parameters())

    monitor = watched(
        Noisy(0, 1, nn.Sequential(nn.Linear(64, 400), nn.Tanh(), nn.Linear(400, 10))), CoordinateCheckMonitor(1)
    )
    assert monitor.first is not None
    values = monitor.first.values

    assert values["coordinate_change"]["net.0"] == pytest.approx(values["coordinate_change_chance"]["net.0"], rel=0.1)


def test_gradient_descent_changes_what_its_inputs_are_far_beyond_chance() -> None:
    monitor = watched(InOrder(0, 1, net()), CoordinateCheckMonitor(1))
    assert monitor.first is not None
    values = monitor.first.values

    for layer, change in values["coordinate_change"].items():
        assert change > 1.5 * values["coordinate_change_chance"][layer]


def test_a_layer_of_zeros_has_no_share_and_does_not_stop_others() -> None:
    start = net()
    nn.init.zeros_(start[4].weight)
    monitor = watched(InOrder(0, 1, start), CoordinateCheckMonitor(1, match=["net.2", "net.4"]))
    assert monitor.first is not None

    assert monitor.first.values["coordinate_size"]["net.4"] == 0
    assert np.isnan(monitor.first.values["coordinate_change"]["net.4"])
    assert monitor.first.values["coordinate_change"]["net.2"] == 0  # no gradient goes through zeros


def test_frozen_layers_are_no_sites() -> None:
    start = net()
    start[0].weight.requires_grad_(False)
    monitor = watched(InOrder(0, 1, start), CoordinateCheckMonitor(1))
    assert monitor.first is not None

    assert set(monitor.first.values["coordinate_change"]) == {"net.2", "net.4"} and monitor.failures == 0


def test_models_without_linear_layers_and_rows_out_of_range_are_refused() -> None:
    convolution = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(ValueError, match=r"finds no linear layer .* among \['net', 'net.0', 'net.1'"):
        watched(Classifier(convolution), CoordinateCheckMonitor())
    for rows in (0, -1, True):
        with pytest.raises(ValueError, match="num_rows"):
            CoordinateCheckMonitor(num_rows=rows)


def in_parallel(rank: int, size: int, root: Path) -> Any:
    module = InOrder(rank, size, net())
    options: dict[str, Any] = {"devices": size, "strategy": "ddp"} if size > 1 else {}
    monitor = watched(module, CoordinateCheckMonitor(2), max_steps=3, **options)
    return monitor.first and monitor.first.values


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    first, second = together(in_parallel, tmp_path)
    (alone,) = together(in_parallel, tmp_path, 1)

    assert first == second
    for quantity, row in alone.items():
        assert first[quantity] == pytest.approx(row, rel=1e-4)
