"""Where curvature cannot be had `CurvatureMonitor` says what is in the way and what to do, and training goes on as it
was.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_lowrank import CurvatureMonitor, Monitor
from tests.trainings import Adversaries, Classifier, MemoryLogger

REMAINS = "critical sharpness needs forward passes only and remains"


def fitted(
    module: L.LightningModule, monitor: Monitor | None, **options: Any
) -> tuple[MemoryLogger, dict[str, Tensor], list[str]]:
    """Curves, weights at the end, and what was warned of."""
    logger = MemoryLogger()
    silent: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.filterwarnings("always", message="lightning_lowrank")
        warnings.filterwarnings("ignore", message=".* no curve")
        L.Trainer(**silent, **options, accelerator="cpu", logger=logger, callbacks=[monitor] if monitor else []).fit(
            module
        )
    return logger, module.state_dict(), [str(one.message) for one in seen if "lightning_lowrank" in str(one.message)]


class Iterating(Classifier):
    """Takes its own batches."""

    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


class FSDPStrategy(SingleDeviceStrategy):
    """Goes by the name of Lightning's, which refuses CPUs."""


class DeepSpeedStrategy(SingleDeviceStrategy):
    """The same for one that is not installed."""


# What is refused before training: module, options of the monitor, of the Trainer, and words of the message in their
# order.
BEFORE: dict[str, tuple[Callable[[], L.LightningModule], dict[str, Any], Callable[[], dict[str, Any]], list[str]]] = {
    "a fixed batch in manual optimization": (
        Adversaries,
        {"batch": "fixed"},
        dict,
        ["the fixed batch", "in manual optimization it steps optimizers", "give loss_fn(module, batch) -> loss"],
    ),
    "critical sharpness in manual optimization": (
        Adversaries,
        {"level": "standard"},
        dict,
        ["in manual optimization it steps optimizers", "give loss_fn(module, batch) -> loss"],
    ),
    "a fixed batch for a step that takes its own": (
        Iterating,
        {"batch": "fixed"},
        dict,
        [
            "the fixed batch",
            "training_step(dataloader_iter) cannot be run again",
            "give loss_fn(module, batch) -> loss",
        ],
    ),
    "an output module that is not there": (
        Classifier,
        {"level": "standard", "output_module": "haed"},
        dict,
        ["output_module='haed' is not a layer", "'net', 'net.0', 'net.1', 'net.2'"],
    ),
    "a pattern that matches nothing": (
        Classifier,
        {"match": "*.wieght"},
        dict,
        ["match", "'*.wieght'", "net.0.weight"],
    ),
    "FSDP1": (
        Classifier,
        {},
        lambda: {"strategy": FSDPStrategy(device=torch.device("cpu"))},
        ["FSDPStrategy cannot be watched", "ModelParallelStrategy with fully_shard (FSDP2)"],
    ),
    "DeepSpeed": (
        Classifier,
        {},
        lambda: {"strategy": DeepSpeedStrategy(device=torch.device("cpu"))},
        ["DeepSpeedStrategy cannot be watched", "Use 'ddp'"],
    ),
}


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter` step flavor")
@pytest.mark.parametrize("case", BEFORE)
def test_what_is_known_before_training_is_refused_with_culprit_and_remedy(case: str) -> None:
    make, options, of_trainer, words = BEFORE[case]
    message = ".*".join(re.escape(word) for word in words)

    with pytest.raises(ValueError, match=f"(?s){message}"):
        fitted(make(), CurvatureMonitor(**options, detail="all"), **of_trainer())


class Flash(nn.Module):
    """Attention by the fused kernel, and by no other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(-1, 1, 8, 8)).chunk(3, -1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Sine(torch.autograd.Function):
    """A kernel whose author has written no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.saved_tensors[0].cos()


class Body(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.between = nn.Linear(64, 8), nn.Linear(8, 10), between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.body, x))


def reentrant(body: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(body, x.requires_grad_(), use_reentrant=True)
    return y.tanh()


# What only the graph of a loss tells: the network, and words of the message.
DURING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a fused kernel and no other": (Flash, f"twice through its fused attention, not even in a replay; {REMAINS}"),
    "a function that is marked": (
        lambda: Body(lambda body, x: Sine.apply(body(x))),  # type: ignore[no-any-return]
        f"twice through Sine, whose backward is marked @once_differentiable; write it with .*{REMAINS}",
    ),
    "reentrant checkpoints": (
        lambda: Body(reentrant),
        rf"reentrant checkpointing; call checkpoint\(.*use_reentrant=False\); {REMAINS}",
    ),
}


@pytest.mark.parametrize("batch", ["live", "fixed"])
@pytest.mark.parametrize("case", DURING)
def test_what_has_no_second_derivative_is_said_once_with_what_to_do_and_gives_no_number(case: str, batch: Any) -> None:
    make, message = DURING[case]
    torch.manual_seed(1)

    logger, _, warned = fitted(
        Classifier(make()), CurvatureMonitor("light", every_n_steps=3, batch=batch, detail="all")
    )

    assert len(warned) == 1 and re.search(message, warned[0])
    assert all(value != value for value in logger.curve("curvature/batch_sharpness").values())


@pytest.mark.parametrize("case", DURING)
def test_what_has_no_second_derivative_has_critical_sharpness(case: str) -> None:
    module = Classifier(DURING[case][0](), optimizer="sgd", lr=0.01)

    logger, _, warned = fitted(module, CurvatureMonitor("standard", [], every_n_steps=4, detail="all"))

    assert warned == []
    assert all(value > 0 for value in logger.curve("curvature/critical_sharpness").values())
    assert len(logger.curve("curvature/critical_sharpness")) == 2


@pytest.mark.parametrize("case", DURING)
def test_a_refusal_during_training_leaves_the_training_alone(case: str) -> None:
    weights = []
    for monitor in (CurvatureMonitor("standard", every_n_steps=4, detail="all"), None):
        torch.manual_seed(1)
        weights.append(fitted(Classifier(DURING[case][0]()), monitor)[1])

    assert_close(weights[0], weights[1], rtol=0, atol=0)


class Regularised(Classifier):
    """A loss of torch's, and something of its own."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.01 * self.net[0].weight.square().sum()  # type: ignore[index, operator, union-attr, return-value]


class TwoLosses(Classifier):
    """Two of torch's."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0]), torch.ones(8, 10))


class OfItsOwn(Classifier):
    """None of torch's."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - F.one_hot(batch[1], 10)).abs().pow(1.5).mean()


UNKNOWN = {
    Regularised: "more than F.cross_entropy: another term is added",
    TwoLosses: "consists of 2 calls: F.cross_entropy, F.mse_loss",
    OfItsOwn: "does not come from one of F.cross_entropy",
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_loss_that_no_call_gives_costs_gauss_newton_and_names_output_module(kind: type[Classifier]) -> None:
    logger, _, warned = fitted(kind(), CurvatureMonitor("standard", top_k=1, every_n_steps=4, detail="all"))

    assert len(warned) == 1 and re.search(
        f"{UNKNOWN[kind]}.*give the name of the layer whose output enters the loss as output_module", warned[0]
    )
    assert all(value != value for value in logger.curve("curvature/gauss_newton_trace").values())
    assert all(value == value for value in logger.curve("curvature/hessian_trace").values())
