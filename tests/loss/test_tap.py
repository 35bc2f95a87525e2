"""What went into the loss is heard during the user's own step, and the loss that is made of it is that of the step."""

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_lowrank.loss.output_loss import CrossEntropy, OutputLoss, SquaredError
from lightning_lowrank.loss.tap import LossTap, module_named
from lightning_lowrank.watching.trainer import TrainerTraining
from tests.trainings import Classifier


class Listener(L.Callback):
    """Makes each step's loss again out of what it heard."""

    def __init__(self, output_module: str | None = None) -> None:
        self.output_module, self.seen = output_module, list[tuple[Tensor, Tensor]]()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tap = LossTap(None if self.output_module is None else module_named(pl_module, self.output_module))

    def on_train_batch_start(self, *_: Any) -> None:
        self.tap.enter()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.tap.exit()
        scale = TrainerTraining(trainer, pl_module).loss_scale()
        self.seen.append((self.tap.reproduce(loss, scale).value(), loss.detach() / scale))


class Step(Classifier):
    """A classifier with a loss of its own making."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


def watched(loss: Callable[[Tensor, Tensor], Tensor], listener: Listener | None = None, **options: Any) -> Listener:
    listener = listener or Listener()
    settings: dict[str, Any] = {"accelerator": "cpu", "max_steps": 3, "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "callbacks": [listener]}
    L.seed_everything(1, verbose=False)
    L.Trainer(**settings | options).fit(Step(loss))
    assert _get_current_function_mode_stack() == []
    return listener


def perplexed(outputs: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        F.cross_entropy(outputs, target).exp()
    F.mse_loss(outputs, outputs.detach())
    return F.cross_entropy(outputs, target)


def one_hot(target: Tensor) -> Tensor:
    return F.one_hot(target, 10).float()


def of_positions(outputs: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs.view(-1, 5), target.repeat_interleave(2) % 5, reduction="none").view(-1, 2)
    mask = (target % 2)[:, None]
    return (losses * mask).sum() / mask.expand_as(losses).sum().clamp(min=1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a function": F.cross_entropy,
    "a module": nn.CrossEntropyLoss(label_smoothing=0.1),
    "beside other calls": perplexed,
    "half of squares": lambda outputs, target: 0.5 * F.mse_loss(outputs, one_hot(target)),
    "binary": lambda outputs, target: nn.BCEWithLogitsLoss(pos_weight=torch.full((10,), 9.0))(outputs, one_hot(target)),
    "log likelihood": lambda outputs, target: nn.NLLLoss()(nn.LogSoftmax(1)(outputs), target),
    "reduced by hand": of_positions,
    "by name": lambda outputs, target: F.cross_entropy(input=outputs, target=target, reduction="sum"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_the_step_is_made_again_from_its_outputs(name: str) -> None:
    listener = watched(LOSSES[name])

    assert len(listener.seen) == 3
    for found, loss in listener.seen:
        assert_close(found, loss)


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "accumulation": lambda: {"accumulate_grad_batches": 3},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true", "accumulate_grad_batches": 3},
    "16-mixed": lambda: {"plugins": MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_trainer_multiplies_the_loss_by_is_taken_out(name: str) -> None:
    listener = watched(F.cross_entropy, **OPTIONS[name]())

    assert len(listener.seen) >= 3
    for found, loss in listener.seen:
        assert_close(found, loss.float(), rtol=2e-2 if name == "bf16-true" else 1e-5, atol=0)


def test_an_exotic_loss_is_seen_at_a_named_layer() -> None:
    listener = watched(lambda outputs, target: outputs.cosh().log().mean() + outputs.norm(), Listener("net.2"))

    assert len(listener.seen) == 3
    for found, loss in listener.seen:
        assert_close(found, loss)


def outputs_and_target() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.arange(6) % 4


def heard(loss: Callable[[Tensor, Tensor], Tensor]) -> OutputLoss:
    outputs, target = outputs_and_target()
    with LossTap() as tap:
        value = loss(outputs, target)
    return tap.reproduce(value)


def focal(outputs: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(outputs, target, reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "two losses": (
        lambda o, t: F.cross_entropy(o, t) + F.mse_loss(o, o.detach()),
        r"2 calls: F.cross_entropy, F.mse_loss.*output_module",
    ),
    "a penalty": (lambda o, t: F.cross_entropy(o, t) + 1e-3 * o.square().sum(), "more than F.cross_entropy"),
    "another function": (
        lambda o, t: F.multi_margin_loss(o, t),
        "does not come from one of F.cross_entropy.*output_module",
    ),
    "driven up": (lambda o, t: -F.cross_entropy(o, t), "it is maximised"),
    "a root": (lambda o, t: F.mse_loss(o, torch.zeros_like(o)).sqrt(), "not F.mse_loss times a constant"),
    "focal": (focal, "not F.cross_entropy times a constant"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_known_loss_is_refused_with_a_reason(name: str) -> None:
    loss, reason = REFUSED[name]

    with pytest.raises(ValueError, match=reason):
        heard(loss)


def test_arguments_that_say_nothing_do_no_harm() -> None:
    assert isinstance(heard(lambda o, t: F.cross_entropy(o, t, size_average=None, reduce=None)), CrossEntropy)


def test_a_call_without_a_graph_is_not_kept() -> None:
    outputs, target = outputs_and_target()
    with LossTap() as tap, torch.no_grad():
        F.cross_entropy(outputs, target)

    assert tap.calls == []


def test_a_call_that_fails_fails_as_it_would_alone() -> None:
    outputs, target = outputs_and_target()

    with LossTap(), pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(outputs, target[:2])


class Other(TorchFunctionMode):
    """One of the user's own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_leaving_takes_itself_off_and_nothing_else() -> None:
    tap, below, above = LossTap(), Other(), Other()
    with below:
        tap.enter()
        with above:
            tap.exit()
            tap.exit()
            left = _get_current_function_mode_stack()

    assert left == [below, above]


def test_what_was_heard_before_is_forgotten_on_entering_again() -> None:
    outputs, _ = outputs_and_target()
    tap = LossTap()
    for _ in range(2):
        tap.enter()
        F.mse_loss(outputs, outputs.detach())

    tap.exit()
    assert [call.name for call in tap.calls] == ["F.mse_loss"]


def test_a_mode_of_the_user_does_not_hide_the_loss() -> None:
    outputs, _ = outputs_and_target()
    with LossTap() as tap, Other():
        loss = F.mse_loss(outputs, torch.zeros(6, 4))

    assert isinstance(tap.reproduce(loss), SquaredError)


def test_a_copy_of_a_watched_layer_is_not_watched() -> None:
    layer = nn.Linear(4, 2)
    with LossTap(layer) as tap:
        layer(torch.ones(3, 4))
        copy.deepcopy(layer)(torch.ones(3, 4))

    assert len(tap.outputs) == 1


def test_a_layer_that_is_checkpointed_is_seen_once() -> None:
    layer, inputs = nn.Linear(4, 2), torch.ones(3, 4)
    with LossTap(layer) as tap:
        loss = checkpoint(nn.Sequential(layer, nn.Tanh()), inputs, use_reentrant=False).sum()
        loss.backward()

    assert len(tap.outputs) == 1


@pytest.mark.parametrize("calls", [0, 2])
def test_a_layer_that_is_not_called_once_is_refused(calls: int) -> None:
    layer = nn.Linear(4, 2)
    with LossTap(layer) as tap:
        loss = torch.stack([layer(torch.ones(3, 4)).sum() for _ in range(calls)] or [layer.bias.sum()]).sum()

    with pytest.raises(ValueError, match=f"returned {calls} tensors"):
        tap.reproduce(loss)


def test_a_loss_that_does_not_depend_on_the_layer_is_refused() -> None:
    layer = nn.Linear(4, 2)
    with LossTap(layer) as tap:
        layer(torch.ones(3, 4))

    with pytest.raises(ValueError, match="does not depend"):
        tap.reproduce(layer.bias.sum())


def test_a_layer_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"output_module='head' is not a layer; the layers are \['0', '1'\]"):
        module_named(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), "head")
