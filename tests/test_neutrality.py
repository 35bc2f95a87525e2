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
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.amp import GradScaler

from lightning_lowrank import Features, Monitor, Probe, RankMonitor
from tests.models import Adversaries, Classifier, ImageNet, Tied, Validated

EVERYTHING = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features", "validation_features")


def half() -> MixedPrecision:
    """16-mixed on CPU; the string alone would become bf16."""
    return MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))


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
    "weight averaging": (Validated, lambda: {"callbacks": [WeightAveraging()]}),
}


def trained(make: Callable[[], L.LightningModule], options: dict[str, Any], monitors: list[Monitor], root: Path) -> dict[str, Any]:
    """All that a run leaves behind."""
    L.seed_everything(3, verbose=False)
    module = make()
    logger = CSVLogger(root, flush_logs_every_n_steps=1)
    settings = {"max_epochs": 2, "logger": logger, "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}
    extra = options.pop("callbacks", [])
    trainer = L.Trainer(**settings, **options, enable_checkpointing=False, callbacks=[*monitors, *extra])
    trainer.fit(module)
    return {
        "state": module.state_dict(),
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "losses": module.losses,
        "logged": {k: v for k, v in trainer.logged_metrics.items() if "/" not in k},
        "rng": (torch.get_rng_state(), np.random.get_state()[1]),
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in module.modules()],
    }


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_with_a_monitor(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    monitor = RankMonitor(EVERYTHING, every_n_steps=2, histograms=True, per_site=True)

    without = trained(make, options(), [], tmp_path / "without")
    watched = trained(make, options(), [monitor], tmp_path / "with")

    torch.testing.assert_close(watched, without, rtol=0, atol=0, equal_nan=True)
    assert monitor.latest is not None and monitor.latest.values


def test_two_monitors_at_once_change_nothing(tmp_path: Path) -> None:
    other = Monitor([Probe("centred_feature", Features(centred=True), ["effective_rank"])], name="second")

    without = trained(Classifier, {}, [], tmp_path / "without")
    watched = trained(Classifier, {}, [RankMonitor(every_n_steps=1), other], tmp_path / "with")

    torch.testing.assert_close(watched, without, rtol=0, atol=0)


IN_A_PROCESS_OF_ITS_OWN = """
import random, sys, lightning as L
from lightning_lowrank import RankMonitor
from tests.models import Classifier
L.seed_everything(3, verbose=False)
callbacks = [RankMonitor(every_n_steps=1)] if sys.argv[1] == "watched" else []
L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=callbacks).fit(Classifier())
print(hash(random.getstate()))
"""


def test_random_numbers_of_python_are_the_same(tmp_path: Path) -> None:
    """In processes without the run-time type checks of the tests, which draw from them."""
    without, watched = (
        subprocess.run([sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, kind], capture_output=True, text=True, check=True).stdout
        for kind in ("alone", "watched")
    )

    assert without == watched


def test_the_scaler_of_the_mixed_precision_case_is_on() -> None:
    assert half().scaler.is_enabled()
