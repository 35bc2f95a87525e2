"""Curvature grows with the loss, from the smallest to the largest that float32 can tell; beyond, it is no number."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lowrank import CurvatureMonitor
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.tap import LossTap
from lightning_lowrank.monitors.curvature.loss_operators import OPERATORS, loss_operators
from lightning_lowrank.monitors.curvature.measurement import EFFORTS, Curvatures, Found
from tests.curvatures import FullBatch, watched

# Powers of the loss's scale in each number; 1 where it is not named.
POWERS = {"squared_norm": 2, "participation_ratio": 0, "defect": 0, "valid": 0, "top_share": 0}
FACTORS = (1e-30, 1e-22, 1e-18, 1e18, 1e20, 1e36)


def measured(factor: float) -> Found:
    torch.manual_seed(0)
    net, inputs, labels = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        torch.randn(40, 6),
        torch.arange(40) % 3,
    )
    tap = LossTap()
    with tap:
        loss = factor * F.cross_entropy(net(inputs), labels)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = loss_operators(
        loss,
        lambda: tap.reproduce(loss),
        dict(net.named_parameters()),
        OPERATORS,
        optimizers=[optimizer],
        team=Team(),
        seed=0,
    )
    state = Curvatures(EFFORTS["standard"], top_k=2)
    numbers = state.measure(found, torch.Generator().manual_seed(0))
    state.judge(numbers)
    return numbers


def power(name: str) -> int:
    return next((power for end, power in POWERS.items() if name.endswith(end)), 1)


def numbers_of(found: Found) -> dict[str, Tensor]:
    return {name: value.double() for name, value in (found.values | found.layers).items() if "defect" not in name}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return numbers_of(measured(1.0))


@pytest.mark.parametrize("factor", FACTORS)
def test_curvature_grows_with_the_loss(factor: float, plain: dict[str, Tensor]) -> None:
    found = numbers_of(measured(factor))

    assert found.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(found[name] / factor ** power(name), expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("factor", [1e-45, 1e-40, 1e-36])
def test_a_loss_that_is_too_small_for_its_dtype_has_no_curvature(factor: float) -> None:
    found = numbers_of(measured(factor))

    assert found.pop("curvature_valid") == 0
    assert all(value.isnan().all() for value in found.values())


class Scaled(FullBatch):
    """A loss in other units, and a learning rate that trains as before."""

    factor = 1.0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.factor * super().training_step(batch, batch_idx)


@pytest.mark.parametrize("factor", [1e-22, 1e20])
def test_a_monitor_shows_the_curvature_of_a_loss_in_other_units(factor: float) -> None:
    found = []
    for of in (1.0, factor):
        module = Scaled(lr=0.1 / of)
        module.factor = of
        logger = watched(module, CurvatureMonitor("standard", top_k=1, every_n_steps=2, detail="all"))
        found.append(
            {name: logger.curve(f"curvature/{name}") for name in ("batch_sharpness", "hessian_trace", "valid")}
        )

    for step, sharpness in found[0]["batch_sharpness"].items():
        assert found[1]["batch_sharpness"][step] / factor == pytest.approx(sharpness, rel=1e-3)
        assert found[1]["hessian_trace"][step] / factor == pytest.approx(found[0]["hessian_trace"][step], rel=1e-3)
        assert found[1]["valid"][step] == 1
