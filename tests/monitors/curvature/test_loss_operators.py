"""Operators of one loss that are multiplied with the same vectors: the products are each operator's own, for less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.tap import LossTap
from lightning_lowrank.monitors.curvature.loss_operators import OPERATORS, LossOperators, loss_operators
from tests.oracles.spectra import gaussian

LABELS, GRID = torch.arange(6) % 3, torch.arange(24).reshape(6, 2, 2) % 3


class Picture(nn.Module):
    """Classes along the second axis, positions along the others."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x).tanh())
        return scores.reshape(-1, 3, 2, 2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


# The network, its loss, which layer is captured, and the passes back that three vectors take: one for each operator,
# and those for changes of the outputs where no product with the Hessian tells of them.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], bool, tuple[str, ...], int]] = {
    "cross entropy": (mlp, lambda z: F.cross_entropy(z, LABELS), False, OPERATORS, 12),
    "pictures": (Picture, lambda z: F.cross_entropy(z, GRID), False, OPERATORS, 12),
    "squared error": (mlp, lambda z: F.mse_loss(z, gaussian(6, 3)), False, OPERATORS, 12),
    "log likelihood": (mlp, lambda z: F.nll_loss(z.log_softmax(1), LABELS), False, OPERATORS, 12),
    "of its own": (mlp, lambda z: z.cosh().log().mean() + z.norm(), True, OPERATORS[:2], 9),
    "linear": (mlp, lambda z: z.sum(), True, OPERATORS[:2], 9),
    "Gauss-Newton first": (mlp, lambda z: F.cross_entropy(z, LABELS), False, ("gauss_newton", "hessian"), 6),
    "Fisher matrices alone": (mlp, lambda z: F.cross_entropy(z, LABELS), False, OPERATORS[2:], 9),
}


def operators(case: str) -> LossOperators:
    make, loss_of, captured, asked, _ = CASES[case]
    torch.manual_seed(0)
    net = make().double()
    tap = LossTap(net if captured else None, ours=True)
    with tap:
        loss = loss_of(net(gaussian(6, 4)))
    options: dict[str, Any] = {"optimizers": [], "team": Team(), "seed": 0}
    return loss_operators(loss, lambda: tap.reproduce(loss), dict(net.named_parameters()), asked, **options)


@pytest.mark.parametrize("case", CASES)
def test_products_with_the_same_vectors_are_those_of_each_operator(case: str) -> None:
    vectors, asked = gaussian(3, operators(case).gradient.numel()), CASES[case][3]
    found = operators(case).products(vectors)
    alone = {name: torch.stack([operators(case).operators[name].multiply(v) for v in vectors]) for name in asked}

    assert_close(found, alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_the_change_of_the_outputs_is_computed_once_for_all_operators(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, passes, grad = operators(case), [], torch.autograd.grad
    loss.products(gaussian(1, loss.gradient.numel()))  # graphs that are made once
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: passes.append(1) or grad(*args, **kwargs))
    loss.products(gaussian(3, loss.gradient.numel()))

    assert len(passes) == CASES[case][4]
