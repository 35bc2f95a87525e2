"""Oracle: kernels of Jacobians that `torch.func` forms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_lowrank.maths.operators.operators import Jacobian
from lightning_lowrank.monitors.tangent_kernel.by_layer import class_summed
from tests.oracles.kernels import COLUMNS, convolutional, filled, mlp, oracle, random, with_norms

NUM = 9


class Tokens(nn.Module):
    """Several rows of every layer for an example; one layer without a bias, one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.gate = nn.Linear(1, 4), nn.Linear(1, 4, bias=False)
        self.norm, self.head, self.unused = nn.LayerNorm(4), nn.Linear(4, COLUMNS), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.tanh(self.lift(x[..., None])) * self.gate(x[..., None])
        return self.head(self.norm(tokens).mean(1))


class Transposed(nn.Module):
    """Weights of inputs times outputs, as of Hugging Face's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(5, COLUMNS)), nn.Parameter(torch.zeros(COLUMNS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class OnlyBias(nn.Module):
    """A norm with a bias and no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.head = nn.Parameter(torch.zeros(5)), nn.Linear(5, COLUMNS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(nn.functional.layer_norm(x, (5,), None, self.bias)))


class Meeting(nn.Module):
    """Every row depends on all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 4), nn.Linear(4, COLUMNS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.head(hidden - hidden.mean(0))


class Twice(nn.Module):
    """One layer for two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, COLUMNS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Recurrent(nn.Module):
    """A layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(1, 3, batch_first=True), nn.Linear(3, COLUMNS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x[..., None])[0][:, -1])


def strided(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolutions in groups, with strides, and transposed ones."""
    first, second = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)
    third = nn.ConvTranspose1d(6, 2, 2, stride=2, bias=False)
    layers = [nn.Unflatten(1, (1, 5)), first, nn.Tanh(), second, nn.Tanh(), third, nn.Flatten(), nn.Linear(12, COLUMNS)]
    return filled(nn.Sequential(*layers)).to(dtype)


def kernel_of(model: nn.Module, inputs: Tensor) -> Tensor | None:
    return class_summed(Jacobian(model(inputs), list(model.parameters())), seed=1)


SEEN: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "norms": with_norms,
    "convolutional": convolutional,
    "strided": strided,
    "tokens": lambda dtype: filled(Tokens()).to(dtype),
    "a norm without a weight": lambda dtype: filled(OnlyBias()).to(dtype),
    "transposed": lambda dtype: filled(Transposed()).to(dtype),
}
UNSEEN: dict[str, Callable[[], nn.Module]] = {
    "examples that meet": Meeting,
    "a batch norm in training": lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, COLUMNS)),
    "a batch norm without running statistics": lambda: nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, COLUMNS)
    ),
    "a layer that is used twice": Twice,
    "a layer without a rule": Recurrent,
    "a weight that is computed": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, COLUMNS)),
    "nothing": lambda: nn.Sequential(nn.Tanh()),
}


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["32", "64"])
@pytest.mark.parametrize("name", SEEN)
def test_the_kernel_is_that_of_the_jacobian(name: str, dtype: torch.dtype, within: float) -> None:
    model, inputs = SEEN[name](dtype=dtype).eval(), random(NUM, 5).to(dtype)
    found = kernel_of(model, inputs)
    expected = oracle(model.double(), inputs.double(), "class_summed")

    assert found is not None
    assert_close(found.double(), expected, rtol=within, atol=within * expected.abs().max().item())


@pytest.mark.parametrize("name", UNSEEN)
def test_what_it_cannot_see_is_left_to_others(name: str) -> None:
    model = filled(UNSEEN[name]()).train()

    assert kernel_of(model, random(NUM, 5).double()) is None


def test_some_of_the_parameters_have_the_kernel_of_these_alone() -> None:
    model, inputs = mlp(), random(NUM, 5).double()
    outputs, named = model(inputs), dict(model.named_parameters())
    whole, *parts = (
        class_summed(Jacobian(outputs, some), seed=1) for some in (list(named.values()), *([p] for p in named.values()))
    )

    assert_close(sum(parts), whole)
