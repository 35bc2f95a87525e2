"""Along the line between two networks: barriers that are known, and batch norms."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_lowrank.analysis.connect.line import barrier, line
from tests.trainings import digits, mlp


def of_digits(module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    outputs = module(batch[0])
    return {"loss": cross_entropy(outputs, batch[1]), "accuracy": (outputs.argmax(1) == batch[1]).float().mean()}


class Weight(nn.Module):
    """Puts out its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(len(x), -1)


def test_a_quadratic_bowl_between_opposite_points_has_no_barrier() -> None:
    v = torch.tensor([1.0, 2.0, 2.0])

    found = line(
        Weight(), {"weight": v}, {"weight": -v}, {"all": [torch.zeros(4, 1)]},
        lambda module, x: {"loss": module(x).square().sum(1).mean()}, points=5,
    )  # fmt: skip

    assert_close(found.values["all/loss"], [9.0, 2.25, 0.0, 2.25, 9.0])
    assert found.barriers == {"all/loss": 0.0}


def test_a_network_and_itself_have_no_barrier() -> None:
    images, labels = digits().tensors
    module = mlp(8)
    state = module.state_dict()

    found = line(module, state, state, {"test": [(images[:40], labels[:40]), (images[40:], labels[40:])]}, of_digits)

    assert all(abs(value) < 1e-6 for value in found.barriers.values())
    assert found.values["test/loss"][0] == pytest.approx(of_digits(module, (images, labels))["loss"].item())


def test_an_accuracy_that_falls_and_a_loss_that_rises_are_barriers() -> None:
    assert barrier([0.0, 0.5, 1.0], [0.9, 0.2, 0.7], -1) == pytest.approx(0.6)
    assert barrier([0.0, 0.5, 1.0], [0.1, 2.0, 0.3], 1) == pytest.approx(1.8)


def test_batch_norms_take_their_statistics_from_the_data() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    images, labels = digits().tensors
    state = module.state_dict()
    wrong = dict(state) | {"1.running_mean": torch.full((8,), 5.0), "1.running_var": torch.full((8,), 9.0)}
    before = {name: tensor.clone() for name, tensor in state.items()}

    found = line(module, wrong, wrong, {"train": [(images, labels)]}, of_digits, points=3, calibrate="train")

    hidden = module[0](images).detach()
    module.eval()
    module[1].running_mean, module[1].running_var = hidden.mean(0), hidden.var(0)
    assert found.values["train/loss"] == pytest.approx([of_digits(module, (images, labels))["loss"].item()] * 3)
    assert not torch.equal(wrong["1.running_mean"], hidden.mean(0))
    assert_close(before["0.weight"], module[0].weight.detach())
    assert module[1].momentum == 0.1


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="points=2 must be at least 3"):
        line(Weight(), {}, {}, {}, of_digits, points=2)
