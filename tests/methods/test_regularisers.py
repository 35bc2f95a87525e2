"""What the penalty and the other regularisers refuse, and what they leave as it is: found by trying to break them."""

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_lowrank import JacobianPenalty, input_noise, jacobian_penalty, weight_decay
from tests.trainings import Classifier

SILENT: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
}


class Careless(nn.Module):
    """Draws at random in eval mode too, and runs a layer with dropout again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = (
            nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.5)),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.layer, x + 0.1 * torch.randn_like(x), use_reentrant=False))


def state_after(module: L.LightningModule, *callbacks: L.Callback) -> dict[str, Tensor]:
    L.seed_everything(0, verbose=False)
    L.Trainer(**SILENT, logger=False, callbacks=list(callbacks)).fit(module)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()} | {"draws": torch.get_rng_state()}


def test_a_penalty_that_is_only_logged_leaves_draws_and_statistics() -> None:
    module = Classifier(Careless())
    other = copy.deepcopy(module)

    assert_close(state_after(other, JacobianPenalty(0.01)), state_after(module), rtol=0, atol=0)


def test_frozen_weights_have_no_part_in_the_penalty() -> None:
    net, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.rand(5, 3)
    expected = jacobian_penalty(net, inputs, "2.weight")
    net[0].requires_grad_(False)

    assert_close(jacobian_penalty(net, inputs), expected)


def test_a_compiled_module_has_the_penalty_of_the_plain_one() -> None:
    net, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.rand(5, 3)

    assert_close(jacobian_penalty(torch.compile(net, backend="eager"), inputs), jacobian_penalty(net, inputs))


# Dynamo looks at the gradient of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_step_may_add_the_penalty() -> None:
    net, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.rand(5, 3)

    def step(x: Tensor) -> Tensor:
        return net(x).square().mean() + 0.1 * jacobian_penalty(net, x)

    assert_close(torch.compile(step, backend="eager")(inputs), step(inputs))


def test_a_penalty_is_measured_where_nothing_else_has_a_gradient() -> None:
    net, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.rand(5, 3)
    with torch.no_grad():
        found = jacobian_penalty(net, inputs)

    assert_close(found, jacobian_penalty(net, inputs))


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3)])
def test_the_penalty_of_a_layer_that_is_called_twice_is_that_of_both_calls_together(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(layer := nn.Linear(3, 3), nn.Tanh(), layer)
    inputs = torch.rand(shape)
    expected = 0.0
    for example in inputs:
        for output in net(example[None]).flatten():
            (gradient,) = torch.autograd.grad(output, layer.weight, retain_graph=True)
            expected += 0.5 / 5 * gradient.square().sum().item()

    assert_close(jacobian_penalty(net, inputs).item(), expected, rtol=1e-5, atol=0)


def test_rows_that_belong_to_no_example_are_refused() -> None:
    net = Gives(lambda y: y)
    net.forward = lambda x: net.layer(x.flatten(0, 1)).reshape(5, 4, 2)  # type: ignore[method-assign]

    with pytest.raises(ValueError, match=r"a layer gets shape \(20, 3\) for 5 examples"):
        jacobian_penalty(net, torch.rand(5, 4, 3))


class Gives(nn.Module):
    """A layer, and what a test makes of its outputs."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(3, 2), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.layer(x))


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "several": (lambda y: (y, y), "returned a tuple for 5 examples"),
    "a sum": (lambda y: y.sum(), r"returned shape \(\) for 5 examples"),
    "constants": (lambda y: y.detach(), "runs without a graph"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_outputs_without_a_jacobian_are_refused(case: str) -> None:
    make, why = REFUSED[case]

    with pytest.raises(ValueError, match=why):
        jacobian_penalty(Gives(make), torch.rand(5, 3))


def test_a_reentrant_checkpoint_is_refused_by_the_penalty() -> None:
    net = Gives(lambda y: y)
    inner = nn.Sequential(net.layer, nn.Tanh())
    net.forward = lambda x: checkpoint(inner, x.requires_grad_(), use_reentrant=True)  # type: ignore[method-assign]

    with pytest.raises(ValueError, match="use_reentrant=False"):
        jacobian_penalty(net, torch.rand(5, 3))


def test_a_strength_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="strength=nan"):
        JacobianPenalty(math.nan)


def test_noise_that_cannot_be_added_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"deviation -1\.0"):
        input_noise(torch.ones(3), -1.0, generator=generator)


def test_weight_decay_of_an_iterator_that_is_spent_is_refused() -> None:
    with pytest.raises(ValueError, match="empty after one use"):
        weight_decay(iter(()), 0.1)
