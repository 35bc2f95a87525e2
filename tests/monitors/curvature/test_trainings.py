"""Whatever the training does, curvature is a number or NaN, is warned of once, and the training is the same bit for
bit.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_lowrank import CurvatureMonitor, Monitor
from tests.trainings import KINDS_OF_HOOKS, Classifier, ImageNet, MemoryLogger, Validated, digits


class NoNumber(Classifier):
    """Its loss is no number in the second step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 1 else 1.0)


class NoNumberAtFirst(Classifier):
    """Its loss is no number in the first step, whose gradient is left out."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (math.nan if self.global_step == 0 else 1.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.parameters():
            p.grad = torch.zeros_like(p) if self.global_step == 0 else p.grad


class Unused(Classifier):
    """A layer that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 5)


class Thawing(Classifier):
    """Freezes its first layer in every other batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(batch_idx % 2 == 1)  # type: ignore[index, union-attr]


class FreezingInTheStep(Classifier):
    """The same, within the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net[0].requires_grad_(batch_idx % 2 == 1)  # type: ignore[index, union-attr]
        return super().training_step(batch, batch_idx)


class FreezingAfterTheBackwardPass(Classifier):
    """The same, where the graph of the loss is gone."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(True)  # type: ignore[index, union-attr]

    def on_after_backward(self) -> None:
        self.net[0].requires_grad_(False)  # type: ignore[index, union-attr]


class OneExample(Classifier):
    """Batches of one."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(3), batch_size=1)


class ShortBatch(Classifier):
    """Eight examples, and then three."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(11), batch_size=8)


class Dictionary(Classifier):
    """Its step gives more than a loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "more": 3}


class SometimesNothing(Classifier):
    """Its step gives no loss in every other batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


class Nothing(Classifier):
    """Its step never gives a loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Double(Classifier):
    """In another precision."""

    dtype_of_weights = torch.float64

    def __init__(self) -> None:
        super().__init__()
        self.to(self.dtype_of_weights)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.dtype_of_weights))


class Half(Double):
    dtype_of_weights = torch.bfloat16


class Zero(Classifier):
    """Everything is."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.parameters():
            nn.init.zeros_(p)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0] * 0, batch[1] * 0), batch_idx) * 0


class Temperature(Classifier):
    """A parameter that is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature


class Generators(Classifier):
    """Batches that cannot be copied."""

    def train_dataloader(self) -> DataLoader[Any]:
        def collate(rows: Any) -> Any:
            return (*torch.utils.data.default_collate(rows), (row for row in rows))

        return DataLoader(digits(24), batch_size=8, collate_fn=collate)


class Scheduled(Classifier):
    """Its learning rate goes to zero."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        fading = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 2))
        return [optimizer], [{"scheduler": fading, "interval": "step"}]


class Optimized(Classifier):
    """By one of torch's optimizers."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


CASES: dict[str, Callable[[], Classifier]] = {
    "a loss that is no number": NoNumber,
    "a loss that is no number at first": NoNumberAtFirst,
    "a layer that is not used": Unused,
    "freezing between batches": Thawing,
    "freezing in the step": FreezingInTheStep,
    "freezing after the backward pass": FreezingAfterTheBackwardPass,
    "one example": OneExample,
    "a short last batch": ShortBatch,
    "a dictionary": Dictionary,
    "sometimes no loss": SometimesNothing,
    "never a loss": Nothing,
    "float64": Double,
    "bfloat16": Half,
    "zero": Zero,
    "a parameter that is one number": Temperature,
    "batches that cannot be copied": Generators,
    "a learning rate of zero": lambda: Classifier(optimizer="sgd", lr=0.0),
    "a learning rate that goes to zero": Scheduled,
    "RMSprop": lambda: Optimized(torch.optim.RMSprop),
    "Rprop": lambda: Optimized(torch.optim.Rprop),
    "validation in between": lambda: Validated(ImageNet()),
}


def left(
    make: Callable[[], Classifier], monitors: list[Monitor], **options: Any
) -> tuple[dict[str, Any], MemoryLogger, list[str]]:
    """What four steps leave behind, the curves, and what was warned of."""
    L.seed_everything(1, verbose=False)
    module, logger = make(), MemoryLogger()
    settings: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "logger": logger,
    }
    settings |= {"max_epochs": 1, "limit_train_batches": 4, "enable_checkpointing": False}
    settings |= {"val_check_interval": 2} if isinstance(module, Validated) else {}
    trainer = L.Trainer(**settings | options, callbacks=[*monitors, *options.pop("callbacks", [])])
    raised = ""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=".* no curve")
        try:
            trainer.fit(module)
        except RuntimeError as error:
            raised = str(error)
    found = {
        "state": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "losses": module.losses,
        "gradients": [p.grad for p in module.parameters() if p.grad is not None],
        "learns": [p.requires_grad for p in module.parameters()],
        "random": torch.get_rng_state(),
        "hooks": [sum(len(getattr(m, kind)) for kind in KINDS_OF_HOOKS) for m in module.modules()],
        "hooks of optimizers": [
            len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in trainer.optimizers
        ],
        "modes": len(_get_current_function_mode_stack()),
        "raised": [ord(letter) for letter in raised],
    }
    return found, logger, [str(one.message) for one in seen if "lightning_lowrank" in str(one.message)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_and_trouble_is_told_once(case: str) -> None:
    without, _, _ = left(CASES[case], [])

    for options in ({"level": "standard", "every_n_steps": 2}, {"batch": "fixed", "every_n_steps": 1}):
        monitor = CurvatureMonitor(operators=["hessian"], top_k=1, **options, detail="all")  # type: ignore[arg-type]
        watched, _, warned = left(CASES[case], [monitor])
        assert_close(watched, without, rtol=0, atol=0, equal_nan=True, msg=str(options))
        assert len(warned) <= 1, warned


class Broken(Classifier):
    """Fails in its third step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            raise RuntimeError("the user's own")
        return loss


@pytest.mark.parametrize("batch", ["live", "fixed"])
def test_an_exception_of_the_users_comes_out_as_it_was(batch: Any) -> None:
    without, _, _ = left(Broken, [])

    watched, _, warned = left(
        Broken, [CurvatureMonitor("standard", ["hessian"], top_k=1, every_n_steps=1, batch=batch, detail="all")]
    )

    assert_close(watched, without, rtol=0, atol=0)
    assert warned == [] and bytes(watched["raised"]) == b"the user's own"


def test_two_monitors_at_once_find_what_each_finds_alone() -> None:
    def monitors() -> list[Monitor]:
        fixed = CurvatureMonitor("light", every_n_steps=1, batch="fixed", name="fixed", detail="all")
        return [CurvatureMonitor("light", every_n_steps=1, detail="all"), fixed]

    without, _, _ = left(lambda: Classifier(ImageNet()), [])
    watched, both, _ = left(lambda: Classifier(ImageNet()), monitors())

    assert_close(watched, without, rtol=0, atol=0)
    for monitor, tag in zip(monitors(), ("curvature/batch_sharpness", "fixed_curvature/batch_sharpness"), strict=True):
        _, alone, _ = left(lambda: Classifier(ImageNet()), [monitor])
        assert both.curve(tag) == alone.curve(tag)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_run_that_is_resumed_is_the_same(tmp_path: Path) -> None:
    found = []
    for watched in (True, False):
        root = tmp_path / str(watched)

        def monitors(watched: bool = watched) -> list[Monitor]:
            return (
                [CurvatureMonitor("standard", ["hessian"], top_k=1, every_n_steps=2, detail="all")] if watched else []
            )

        saving = {"enable_checkpointing": True, "default_root_dir": root}
        left(Classifier, [*monitors(), ModelCheckpoint(root)], **saving)  # type: ignore[list-item]
        (path,) = root.rglob("*.ckpt")
        module = Classifier()
        settings: dict[str, Any] = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "logger": False,
        }
        torch.manual_seed(2)
        L.Trainer(**settings, enable_checkpointing=False, max_epochs=2, callbacks=monitors()).fit(
            module, ckpt_path=path
        )
        found.append(module.state_dict())

    assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_loss_that_is_no_number_at_first_does_not_silence_what_comes_after() -> None:
    _, logger, _ = left(NoNumberAtFirst, [CurvatureMonitor("light", every_n_steps=1, detail="all")])

    finite = [math.isfinite(value) for value in logger.curve("curvature/batch_sharpness").values()]
    assert finite == [False, True, True, True]


def test_parameters_that_were_frozen_a_moment_later_keep_their_own_numbers() -> None:
    options: dict[str, Any] = {"per_site": True, "every_n_steps": 1}
    _, frozen, _ = left(
        FreezingAfterTheBackwardPass,
        [CurvatureMonitor("standard", ["hessian"], **options, detail="all")],
        limit_train_batches=1,
    )
    _, plain, _ = left(
        Classifier, [CurvatureMonitor("standard", ["hessian"], **options, detail="all")], limit_train_batches=1
    )

    for parameter in ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"):
        assert frozen.curve(f"hessian_layer_trace/{parameter}") == plain.curve(f"hessian_layer_trace/{parameter}")


@pytest.mark.parametrize("kind", [Thawing, FreezingInTheStep])
def test_freezing_costs_no_number_of_the_whole_model(kind: type[Classifier]) -> None:
    _, logger, _ = left(kind, [CurvatureMonitor("standard", ["hessian"], top_k=1, every_n_steps=1, detail="all")])

    assert all(math.isfinite(value) for value in logger.curve("curvature/hessian_lambda_max").values())


def test_a_batch_that_cannot_be_copied_costs_only_what_runs_it_again() -> None:
    _, logger, warned = left(
        Generators, [CurvatureMonitor("standard", ["hessian"], top_k=1, every_n_steps=1, detail="all")]
    )

    assert all(math.isfinite(value) for value in logger.curve("curvature/hessian_lambda_max").values())
    assert "the batch cannot be copied (TypeError: cannot pickle 'generator' object)" in warned[0]


def test_a_parameter_that_is_one_number_has_an_edge_of_stability() -> None:
    _, logger, _ = left(
        Temperature, [CurvatureMonitor("standard", ["hessian"], top_k=1, every_n_steps=1, detail="all")]
    )

    # Adam has no preconditioner before its first step.
    assert [math.isfinite(value) for value in logger.curve("curvature/sharpness_over_threshold").values()] == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("case", ["RMSprop", "Rprop", "a learning rate of zero", "one example"])
def test_sharpness_does_not_need_an_edge(case: str) -> None:
    _, logger, _ = left(CASES[case], [CurvatureMonitor("light", every_n_steps=1, detail="all")])

    assert all(math.isfinite(value) for value in logger.curve("curvature/batch_sharpness").values())
