"""What is no failure of a monitor is not counted as one, or once, with the reason."""

import re
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lowrank import CurvatureMonitor, Monitor, NTKMonitor, RankMonitor
from tests.trainings import Classifier, MemoryLogger

QUIET: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
SOURCES = ["gradients", "weights", "updates", "displacement", "features"]


def watched(module: L.LightningModule, monitor: Monitor, **options: Any) -> MemoryLogger:
    logger = MemoryLogger()
    L.Trainer(logger=logger, callbacks=[monitor], **QUIET, **{"max_epochs": 1} | options).fit(module)
    return logger


class Skipping(Classifier):
    """Returns None for every other batch, which is Lightning's way to skip it."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return None if batch_idx % 2 == 0 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_is_skipped_is_no_failure() -> None:
    monitor = RankMonitor(SOURCES, every_n_steps=2)
    logger = watched(Skipping(), monitor)

    assert monitor.failures == 0
    assert len(logger.curve("rank/gradient_stable_rank_median")) == 4


class Unused(Classifier):
    """Has a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 10)))
        self.spare = nn.Linear(5, 5)


@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
def test_a_layer_that_is_never_used_is_counted_once() -> None:
    monitor = RankMonitor(["gradients"], every_n_steps=1)
    watched(Unused(), monitor)

    assert monitor.failures == 1


class Freezing(Classifier):
    """Freezes its first layer in mid-run."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.net[0].requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
def test_a_layer_that_is_frozen_ends_its_curve() -> None:
    monitor = RankMonitor(["gradients", "updates"], every_n_steps=1, per_site=True)
    logger = watched(Freezing(), monitor)

    # The sample in which it was frozen misses a gradient and an update; no later one does.
    assert monitor.failures <= 2
    assert [step for step, x in logger.curve("gradient_stable_rank/net.0.weight").items() if x == x] == [0, 1, 2]
    assert len(logger.curve("gradient_stable_rank/net.2.weight")) == 8


class Vectors(Classifier):
    """Puts out one number for each example, without an axis for it."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 1), nn.Flatten(0)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()


@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
def test_outputs_of_one_dimension_are_counted_once() -> None:
    monitor = RankMonitor(["features"], every_n_steps=1, match="net.1")
    watched(Vectors(), monitor)

    assert monitor.failures == 1


class Exotic(Classifier):
    """A loss that is none of torch's."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]).softmax(-1) - nn.functional.one_hot(batch[1], 10)).abs().sum()


@pytest.mark.parametrize("kind", [NTKMonitor, lambda **o: CurvatureMonitor("standard", **o)])
def test_a_loss_that_cannot_be_seen_is_said_once(kind: Any) -> None:
    monitor = kind(every_n_steps=1)
    with pytest.warns(UserWarning, match="output_module") as said:
        watched(Exotic(), monitor)

    assert len([one for one in said if "output_module" in str(one.message)]) == 1
    assert monitor.failures <= 6


class Bare(torch.optim.SGD):
    """Without a learning rate in its groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            del group["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(0.1 * p.grad)
        return loss


class Wrap(torch.optim.Optimizer):
    """A wrapper as users write them, without `super().__init__()`: it has no dictionaries of hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.inner.state_dict()


class WithOptimizer(Classifier):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


@pytest.mark.parametrize("make", [Bare, lambda params: Wrap(torch.optim.SGD(params, lr=0.1))])
def test_optimizers_that_are_not_quite_torchs_are_watched(make: Any) -> None:
    rank, curvature = RankMonitor(SOURCES, every_n_steps=2), CurvatureMonitor("standard", ["hessian"], every_n_steps=2)
    logger = MemoryLogger()
    L.Trainer(logger=logger, callbacks=[rank, curvature], **QUIET, max_epochs=1).fit(WithOptimizer(make))

    assert rank.failures == 0
    for tag in ("rank/update_stable_rank_median", "rank/gradient_stable_rank_median", "curvature/hessian_lambda_max"):
        assert len(logger.curve(tag)) == 4
        assert all(value > 0 for value in logger.curve(tag).values())


class InBackward(Classifier):
    """Steps its weights inside the backward pass, where gradients are freed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.each = {p: torch.optim.SGD([p], lr=0.1) for p in self.net.parameters()}
        for parameter in self.each:
            parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter: nn.Parameter) -> None:
        self.each[parameter].step()
        self.each[parameter].zero_grad(set_to_none=True)


@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
def test_updates_inside_the_backward_pass_are_blank_and_not_zero() -> None:
    module, monitor = InBackward(), RankMonitor(["updates"], every_n_steps=2)
    with pytest.warns(UserWarning, match=r"changed before its optimizer stepped"):
        logger = watched(module, monitor)

    assert all(value != value for value in logger.curve("rank/update_stable_rank_median").values())


class Replaced(Classifier):
    """Takes another optimizer in mid-run."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=0.1)]


def test_an_optimizer_that_is_replaced_is_followed() -> None:
    monitor = RankMonitor(["gradients", "updates"], every_n_steps=1)
    logger = watched(Replaced(), monitor)

    assert monitor.failures == 0
    assert len(logger.curve("rank/update_stable_rank_median")) == 8


def test_anomaly_mode_does_not_name_our_products() -> None:
    class Strange(Classifier):
        """A root whose second derivative at 0 is infinite."""

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return cross_entropy(self(batch[0]), batch[1]) + self.net[0].weight.square().sum().add(1).sqrt()

    monitor = CurvatureMonitor("standard", every_n_steps=1)
    L.Trainer(max_steps=2, logger=False, callbacks=[monitor], detect_anomaly=True, **QUIET).fit(Strange())

    assert not any(re.search("anomaly|returned nan", event.message) for event in monitor.events)
