"""Watching changes nothing: training with and without monitors is equal bit for bit."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from tests.callbacks import Inline, Replaying
from tests.monitors import BY_HAND, INCOMPLETE, REFUSED, watcher, watchers
from tests.processes import together
from tests.trainings import CASES, COMPILED, LOSSES, QUIET, Classifier, ImageNet, Validated, half, trained, unwatched

pytestmark = pytest.mark.filterwarnings("ignore:.*lightning_lowrank")  # of what is in INCOMPLETE

# Those in which each watches alone.
FEW = ("dropout and batch norm", "16-mixed, fused AdamW", "two optimizers in turn", "activation checkpointing")


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_with_all_monitors_at_once(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    monitors = watchers(case)

    watched = trained(make, options(), list(monitors.values()), tmp_path)

    assert_close(watched, unwatched(case), rtol=0, atol=0, equal_nan=True)
    for name, monitor in monitors.items():
        assert monitor.latest is not None and monitor.latest.values, name
        assert (monitor.failures > 0) == ((name, case) in INCOMPLETE), name


ALONE = [(name, case) for case in FEW for name in watchers(case)]


@pytest.mark.parametrize(("name", "case"), ALONE)
def test_training_is_the_same_with_each_alone(name: str, case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    monitors = watchers(case, name)

    watched = trained(make, options(), list(monitors.values()), tmp_path)

    assert_close(watched, unwatched(case), rtol=0, atol=0, equal_nan=True)
    assert monitors[name].latest is not None and monitors[name].latest.values


@pytest.mark.parametrize("case", ["dropout and batch norm", "two optimizers in turn"])
def test_training_with_products_in_fewer_bits_is_the_same(case: str, tmp_path: Path) -> None:
    """Monitors multiply in float32, and leave it to training how it multiplies: `trained` compares the settings."""
    make, options = CASES[case]
    torch.set_float32_matmul_precision("medium")
    try:
        unwatched = trained(make, options(), [], tmp_path)
        watched = trained(make, options(), list(watchers(case).values()), tmp_path)
    finally:
        torch.set_float32_matmul_precision("highest")

    assert_close(watched, unwatched, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "case"), REFUSED)
def test_what_a_monitor_cannot_watch_it_refuses_before_training(name: str, case: str, tmp_path: Path) -> None:
    make, options = CASES.get(case) or (lambda: COMPILED[case]("eager"), dict)
    module = make()

    with pytest.raises(ValueError, match=REFUSED[name, case]):
        trained(lambda: module, options(), [watcher(name, case)], tmp_path)
    assert module.losses == []


def test_what_is_refused_by_hand_is_watched_with_a_loss_function() -> None:
    for (name, case), message in REFUSED.items():
        assert (name in watchers(case)) == (message == BY_HAND)


BACKENDS = [("module", "inductor"), *((what, "aot_eager") for what in COMPILED)]
FURTHER = [pytest.param(what, "inductor", marks=pytest.mark.evidence) for what in COMPILED if what != "module"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("what", "backend"), [*BACKENDS, *FURTHER])
def test_training_a_compiled_module_is_the_same_with_all_monitors(what: str, backend: str, tmp_path: Path) -> None:
    monitors, replaying = watchers(what), Replaying(every=3)
    options = {"max_epochs": 1}

    without = trained(lambda: COMPILED[what](backend), dict(options), [], tmp_path / "without")
    callbacks = [*monitors.values(), replaying]
    watched = trained(lambda: COMPILED[what](backend), dict(options), callbacks, tmp_path / "with")

    assert_close(watched, without, rtol=0, atol=0)
    assert len(replaying.curvatures) == 3
    for name, monitor in monitors.items():
        assert monitor.failures == 0, name
        sites = [site for values in monitor.latest.values.values() for site in values]
        assert sites and not any("_orig_mod" in site for site in sites), name


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_run_that_is_stopped_and_resumed_is_the_same_with_all_monitors(tmp_path: Path) -> None:
    found = []
    for name, case in {"without": None, "with": "validation"}.items():
        root = tmp_path / name
        make = lambda: Validated(ImageNet())  # noqa: E731
        first, second = ([*watchers(case).values()] if case else [] for _ in range(2))
        trained(make, {"callbacks": [ModelCheckpoint(root / "checkpoints")], "max_epochs": 1}, first, root / "first")
        (path,) = root.rglob("*.ckpt")
        found.append(trained(make, {"max_epochs": 2}, second, root / "second", resume=path))

    assert_close(found[1], found[0], rtol=0, atol=0)


class Drawing(Classifier):
    """Its loss is as Python's generator says."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return random.random() * super().training_step(batch, batch_idx)


def drawn(rank: int, size: int, root: Path) -> list[Any]:
    """State of Python's generator after three trainings: alone, with all monitors, with replays."""
    states = []
    for callbacks in ([], [*watchers("plain").values()], [Replaying()]):
        L.seed_everything(3, verbose=False)
        L.Trainer(**QUIET, logger=False, max_epochs=1, callbacks=callbacks).fit(Drawing())
        states.append(random.getstate())
    return states


def test_random_numbers_of_python_are_the_same(tmp_path: Path) -> None:
    """In a process without the run-time type checks of the tests, which draw from them."""
    ((alone, watched, replayed),) = together(drawn, tmp_path, size=1)

    assert alone == watched == replayed


def test_the_scaler_of_the_mixed_precision_case_is_on() -> None:
    assert half().scaler.is_enabled()


# A step can be run again, and differentiated twice, so that nobody can tell


def callbacks_of(case: str) -> Sequence[Any]:
    """Replays after steps, and a double backward on the live graph where that has one."""
    replaying = Replaying(every=3, loss_fn=LOSSES.get(case))
    return [replaying] if case == "fused attention" else [replaying, Inline()]


def assert_differentiated(callback: Any, least: int) -> None:
    assert len(callback.curvatures) >= least
    assert all(value and value - value == 0 for value in callback.curvatures)  # finite, and not zero


@pytest.mark.parametrize("case", [case for case in CASES if case != "reentrant checkpoint"])
def test_training_is_the_same_with_replays_and_double_backward(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    callbacks = callbacks_of(case)

    watched = trained(make, options(), callbacks, tmp_path)

    assert_close(watched, unwatched(case), rtol=0, atol=0, equal_nan=True)
    assert_differentiated(callbacks[0], 6)


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("which", [0, 1], ids=["replays", "double backward"])
def test_training_is_the_same_with_one_of_them(which: int, case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    callback = callbacks_of(case)[which]

    watched = trained(make, options(), [callback], tmp_path)

    assert_close(watched, unwatched(case), rtol=0, atol=0, equal_nan=True)
    assert len(callback.curvatures) >= 6
