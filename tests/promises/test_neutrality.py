"""Watching changes nothing: training with and without a monitor is equal bit for bit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.amp import GradScaler
from torch.utils.checkpoint import checkpoint

from lightning_lowrank import Features, Monitor, Probe, RankMonitor
from tests.trainings import Adversaries, Classifier, ImageNet, Tied, Validated

EVERYTHING = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features", "validation_features")


KINDS_OF_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def half() -> MixedPrecision:
    """16-mixed on CPU; the string alone would become bf16."""
    return MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))


class Checkpointed(nn.Module):
    """Its first part runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Finetuned(Classifier):
    """A backbone that is frozen at first."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.backbone, self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def adapted() -> Classifier:
    """A frozen model with LoRA pairs from peft."""
    from peft import LoraConfig, get_peft_model

    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return Classifier(get_peft_model(net, LoraConfig(target_modules=["0", "2"], r=4, lora_dropout=0.1)))


def unfreezing() -> dict[str, Any]:
    """The backbone joins the optimizer in the second epoch."""
    return {"callbacks": [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)]}


CASES: dict[str, tuple[Callable[[], L.LightningModule], Callable[[], dict[str, Any]]]] = {
    "plain": (Classifier, dict),
    "dropout and batch norm": (lambda: Classifier(ImageNet()), dict),
    "validation": (lambda: Validated(ImageNet()), dict),
    "accumulation": (Classifier, lambda: {"accumulate_grad_batches": 3}),
    "clipping by norm": (Classifier, lambda: {"gradient_clip_val": 0.01}),
    "clipping by value": (Classifier, lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "16-mixed": (Classifier, lambda: {"plugins": half()}),
    "16-mixed, fused AdamW": (lambda: Classifier(fused=True), lambda: {"plugins": half()}),
    "bf16-mixed": (Classifier, lambda: {"precision": "bf16-mixed"}),
    "bf16-true": (Classifier, lambda: {"precision": "bf16-true"}),
    "fused AdamW": (lambda: Classifier(fused=True), dict),
    "momentum": (lambda: Classifier(optimizer="sgd", momentum=0.9), dict),
    "two optimizers by hand": (Adversaries, dict),
    "two optimizers in turn": (lambda: Adversaries(every=3), dict),
    "LBFGS": (lambda: Classifier(optimizer="lbfgs", max_iter=4), dict),
    "tied weights": (lambda: Classifier(Tied()), dict),
    "spectral norm": (lambda: Classifier(nn.utils.parametrizations.spectral_norm(nn.Linear(64, 10))), dict),
    "activation checkpointing": (lambda: Classifier(Checkpointed()), dict),
    "backbone unfrozen": (Finetuned, unfreezing),
    "LoRA": (adapted, dict),
    "weight averaging": (Validated, lambda: {"callbacks": [WeightAveraging()]}),
}


def settings_of_torch() -> tuple[Any, ...]:
    """What is global and could be left changed."""
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
    )


def trained(
    make: Callable[[], Any], options: dict[str, Any], monitors: list[Monitor], root: Path, *, resume: Path | None = None
) -> dict[str, Any]:
    """All that a run leaves behind."""
    L.seed_everything(3, verbose=False)
    before = settings_of_torch()
    module = make()
    logger = CSVLogger(root, flush_logs_every_n_steps=1)
    settings = {
        "max_epochs": 2,
        "logger": logger,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    extra = options.pop("callbacks", [])
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in extra)
    trainer = L.Trainer(**settings | options, enable_checkpointing=keeps, callbacks=[*monitors, *extra])
    trainer.fit(module, ckpt_path=resume)
    assert settings_of_torch() == before
    return {
        "state": module.state_dict(),
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "losses": module.losses,
        "logged": {k: v for k, v in trainer.logged_metrics.items() if "/" not in k},
        "rng": (torch.get_rng_state(), np.random.get_state()[1]),
        "hooks": [sum(len(getattr(m, kind)) for kind in KINDS_OF_HOOKS) for m in module.modules()],
        "hooks of optimizers": [
            len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in trainer.optimizers
        ],
    }


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_with_a_monitor(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    monitor = RankMonitor(EVERYTHING, every_n_steps=2, histograms=True, per_site=True)

    without = trained(make, options(), [], tmp_path / "without")
    watched = trained(make, options(), [monitor], tmp_path / "with")

    torch.testing.assert_close(watched, without, rtol=0, atol=0, equal_nan=True)
    assert monitor.latest is not None and monitor.latest.values


class Quiet(Classifier):
    """Without `self.log`, which Dynamo cannot trace on Python 3.11."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())


def compiled(backend: str) -> torch.nn.Module:
    """The whole module, as `torch.compile` gives it."""
    return torch.compile(Quiet(), backend=backend)  # type: ignore[return-value]


def compiled_in_place(backend: str) -> Classifier:
    """The whole module, its class unchanged."""
    module = Classifier()
    module.compile(backend=backend)
    return module


def compiled_inside(backend: str) -> Classifier:
    """One layer of the module."""
    return Classifier(
        nn.Sequential(torch.compile(nn.Sequential(nn.Linear(64, 32), nn.ReLU()), backend=backend), nn.Linear(32, 10))
    )


COMPILED = {"module": compiled, "module in place": compiled_in_place, "layer": compiled_inside}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("what", COMPILED)
def test_training_a_compiled_module_is_the_same_with_a_monitor(what: str, backend: str, tmp_path: Path) -> None:
    monitor = RankMonitor(EVERYTHING[:-2], every_n_steps=2, per_site=True)

    without = trained(lambda: COMPILED[what](backend), {}, [], tmp_path / "without")
    watched = trained(lambda: COMPILED[what](backend), {}, [monitor], tmp_path / "with")

    torch.testing.assert_close(watched, without, rtol=0, atol=0)
    assert monitor.failures == 0
    assert not any("_orig_mod" in site for values in monitor.latest.values.values() for site in values)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_run_that_is_stopped_and_resumed_is_the_same_with_a_monitor(tmp_path: Path) -> None:
    found = []
    for name, monitors in {"without": lambda: [], "with": lambda: [RankMonitor(EVERYTHING, every_n_steps=3)]}.items():
        root = tmp_path / name
        make = lambda: Validated(ImageNet())  # noqa: E731
        trained(make, {"callbacks": [ModelCheckpoint(root / "checkpoints")]}, monitors(), root / "first")
        (path,) = root.rglob("*.ckpt")
        found.append(trained(make, {"max_epochs": 4}, monitors(), root / "second", resume=path))

    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_two_monitors_at_once_change_nothing(tmp_path: Path) -> None:
    other = Monitor([Probe("centred_feature", Features(centred=True), ["effective_rank"])], name="second")

    without = trained(Classifier, {}, [], tmp_path / "without")
    watched = trained(Classifier, {}, [RankMonitor(every_n_steps=1), other], tmp_path / "with")

    torch.testing.assert_close(watched, without, rtol=0, atol=0)


IN_A_PROCESS_OF_ITS_OWN = """
import random, sys, lightning as L
from lightning_lowrank import RankMonitor
from tests.trainings import Classifier
L.seed_everything(3, verbose=False)
callbacks = [RankMonitor(every_n_steps=1)] if sys.argv[1] == "watched" else []
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
L.Trainer(max_epochs=1, callbacks=callbacks, **quiet).fit(Classifier())
print(random.getstate()[1])
"""


def test_random_numbers_of_python_are_the_same(tmp_path: Path) -> None:
    """In processes without the run-time type checks of the tests, which draw from them."""
    without, watched = (
        subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, kind], capture_output=True, text=True, check=True
        ).stdout
        for kind in ("alone", "watched")
    )

    assert without == watched


def test_the_scaler_of_the_mixed_precision_case_is_on() -> None:
    assert half().scaler.is_enabled()
