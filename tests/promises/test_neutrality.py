"""Watching changes nothing: training with and without a monitor is equal bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lowrank import Features, Monitor, Probe, RankMonitor
from tests.trainings import CASES, COMPILED, Classifier, ImageNet, Validated, half, trained

EVERYTHING = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features", "validation_features")


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_with_a_monitor(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    monitor = RankMonitor(EVERYTHING, every_n_steps=2, histograms=True, per_site=True)

    without = trained(make, options(), [], tmp_path / "without")
    watched = trained(make, options(), [monitor], tmp_path / "with")

    torch.testing.assert_close(watched, without, rtol=0, atol=0, equal_nan=True)
    assert monitor.latest is not None and monitor.latest.values


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
