"""Wrong products are found out, and right ones are not, kinks or none."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_lowrank.maths.operators.operators import Operator
from lightning_lowrank.maths.operators.traces import Estimate
from lightning_lowrank.monitors.curvature.self_check import difference_defect, is_wrong, symmetry_defect
from tests.oracles.spectra import gaussian, generator


def of_matrix(matrix: Tensor) -> Operator:
    return Operator(len(matrix), lambda vector: matrix @ vector, matrix.device, matrix.dtype)


def test_symmetric_operators_have_no_defect() -> None:
    matrix = gaussian(50, 50)

    assert symmetry_defect(of_matrix(matrix + matrix.T), generator()) < 1e-12


def test_an_antisymmetric_part_shows() -> None:
    matrix = gaussian(50, 50)
    symmetric, other = matrix + matrix.T, matrix - matrix.T
    found = torch.stack([symmetry_defect(of_matrix(symmetric + 0.1 * other), generator(seed)) for seed in range(50)])

    assert_close(found.mean().item(), 0.16, rtol=0.2, atol=0)


class Half(torch.autograd.Function):
    """A quarter of the cube, with a right gradient of which autograd sees a part: a second derivative that is
    symmetric, and wrong.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3 / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 0.375 * gradient * (x**2 + x.detach() ** 2)


class Cube(nn.Module):
    def __init__(self, *, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        cubed: Tensor = Half.apply(x) if self.wrong else x**3 / 4
        return x + cubed


def net(activation: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), activation, nn.Linear(32, 16), activation, nn.Linear(16, 4))


def losses_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Callable[[], AbstractContextManager[Tensor]]:
    inputs, labels = gaussian(64, 8).to(dtype), torch.arange(64) % 4

    @contextmanager
    def losses() -> Iterator[Tensor]:
        yield F.cross_entropy(model.to(dtype)(inputs), labels)

    return losses


def defect_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Estimate:
    return difference_defect(losses_of(model, dtype), list(model.to(dtype).parameters()))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), Cube(wrong=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_smooth_nets_products_are_the_slope_of_the_gradient(activation: nn.Module, dtype: torch.dtype) -> None:
    assert defect_of(net(activation), dtype).value < 0.01


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardtanh(), nn.LeakyReLU()])
def test_kinks_are_no_fault(activation: nn.Module, seed: int) -> None:
    assert is_wrong(defect_of(net(activation, seed))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_symmetric_product_that_is_wrong_is_found_out(dtype: torch.dtype) -> None:
    model = net(Cube(wrong=True))

    assert is_wrong(defect_of(model, dtype)) == 1
    assert is_wrong(defect_of(net(Cube(wrong=False)), dtype)) == 0


def test_a_product_that_is_zero_where_it_should_not_be_is_found_out() -> None:
    weight = nn.Parameter(gaussian(5))

    class Flat(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.detach())
            return x.square().sum()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * 2 * ctx.saved_tensors[0]

    @contextmanager
    def losses() -> Iterator[Tensor]:
        yield Flat.apply(weight)

    assert is_wrong(difference_defect(losses, [weight])) == 1


def test_the_weights_are_put_back_bit_for_bit() -> None:
    model = net(nn.Tanh())
    before = [p.detach().clone() for p in model.parameters()]
    defect_of(model)

    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_loss_that_is_linear_has_no_defect() -> None:
    weight = nn.Parameter(gaussian(5))

    @contextmanager
    def losses() -> Iterator[Tensor]:
        yield weight.sum()

    assert difference_defect(losses, [weight]).value == 0
