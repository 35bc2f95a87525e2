"""Monitors are classes: of one family, to be subclassed, shown, copied, sent and told apart."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest

from lightning_lowrank import (
    ConcentrationMonitor,
    CurvatureMonitor,
    GradientAnatomyMonitor,
    Monitor,
    MultifractalMonitor,
    NTKMonitor,
    RankMonitor,
)
from lightning_lowrank.watching.monitor import IDLE
from tests.trainings import QUIET, Classifier

KINDS: list[Callable[..., Monitor]] = [
    RankMonitor,
    CurvatureMonitor,
    NTKMonitor,
    MultifractalMonitor,
    GradientAnatomyMonitor,
    ConcentrationMonitor,
]
COPIES: dict[str, Callable[[Monitor], Monitor]] = {
    "copied": copy.deepcopy,
    "pickled": lambda monitor: pickle.loads(pickle.dumps(monitor)),
}
of_each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def fit(*monitors: L.Callback) -> None:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.seed_everything(0, verbose=False)
    L.Trainer(max_steps=2, logger=False, accelerator="cpu", callbacks=list(monitors), **quiet).fit(Classifier())


@of_each_kind
def test_each_is_a_monitor_and_a_callback(kind: Any) -> None:
    monitor = kind()

    assert isinstance(monitor, Monitor) and isinstance(monitor, L.Callback) and type(monitor) is kind


class Sparse(RankMonitor):
    """A monitor of the user's own, with a cadence of its own."""

    def __init__(self, times: int = 1, **options: Any) -> None:
        super().__init__(every_n_steps=times, **options)


def test_a_subclass_is_made_and_trained_as_its_parent() -> None:
    monitor = Sparse(2, name="mine")

    fit(monitor)

    assert repr(monitor) == "Sparse(2, name='mine')"
    assert monitor.state_key == "Sparse[mine_rank]" and monitor.label == "mine_rank"
    assert monitor.latest is not None and monitor.latest.step == 0


def test_it_is_shown_with_the_arguments_that_were_given() -> None:
    shown = repr(RankMonitor("gradients", every_n_steps=5, name="a"))

    assert shown == "RankMonitor('gradients', every_n_steps=5, name='a')"
    assert repr(RankMonitor()) == "RankMonitor()"


@of_each_kind
def test_the_arguments_of_a_kind_are_its_own(kind: Any) -> None:
    """For `help`, editors and LightningCLI."""
    names = list(inspect.signature(kind).parameters)

    assert "name" in names and "detail" in names and not {"args", "options"} & set(names)


def test_the_arguments_of_a_monitor_of_ones_own_probes_are_its_own() -> None:
    assert list(inspect.signature(Monitor).parameters)[:2] == ["probes", "detail"]


@pytest.mark.parametrize("trained", [False, True], ids=["before a run", "after a run"])
@pytest.mark.parametrize("way", COPIES)
@of_each_kind
def test_a_copy_watches_as_the_original_would(kind: Any, way: str, trained: bool) -> None:
    options = {"num_examples": 2, "num_projections": 4} if kind is NTKMonitor else {}
    original = kind(name="one", every_n_steps=1, **options)
    if trained:
        fit(original)

    copied = COPIES[way](original)

    assert repr(copied) == repr(original) and copied.place == original.place
    fit(copied)
    fit(fresh := kind(name="one", every_n_steps=1, **options))
    assert copied.latest is not None and fresh.latest is not None
    # As words: NaN is no number's equal.
    assert repr(copied.latest) == repr(fresh.latest)


@of_each_kind
def test_two_of_one_kind_are_refused_by_our_message_and_told_apart_by_name(kind: Any) -> None:
    name = kind.__name__
    message = (
        rf"two {name} in one training, {name}\(\) and {name}\(\); distinguish them with {name}\(\.\.\., name='\.\.\.'\)"
    )
    with pytest.raises(ValueError, match=message):
        fit(kind(), kind())

    fit(first := kind(), second := kind(name="second"))

    assert (first.state_key, second.state_key) == (name, f"{name}[{second.label}]")


def test_places_in_a_checkpoint_are_plain_words_once_a_run_begins() -> None:
    monitor, other = RankMonitor(), RankMonitor(["weights"], every_n_steps=7)
    assert monitor.state_key != other.state_key

    fit(monitor)
    fit(other)

    assert monitor.state_key == other.state_key == "RankMonitor"


class WithItsOwn(Classifier):
    """Brings a monitor along."""

    def configure_callbacks(self) -> list[L.Callback]:
        return [MultifractalMonitor(every_n_steps=2)]


def test_a_monitor_of_the_modules_own_leaves_those_of_the_trainer() -> None:
    """Lightning puts a module's callback in the place of the Trainer's of the same class, and of no other."""
    theirs = RankMonitor(every_n_steps=2)
    trainer = L.Trainer(**QUIET, max_steps=3, logger=False, callbacks=[theirs])
    trainer.fit(WithItsOwn())

    (own,) = [callback for callback in trainer.callbacks if isinstance(callback, MultifractalMonitor)]
    assert theirs in trainer.callbacks
    assert theirs.latest is not None and own.latest is not None


class Looks(L.Callback):
    """Which hooks of a monitor Lightning may call at each step."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor, self.seen = monitor, list[list[str]]()

    def on_before_backward(self, *_: Any) -> None:
        self.seen.append([name for name in IDLE if callable(getattr(self.monitor, name))])


class Passing(L.Callback):
    """A user's own callback, which passes every hook on to a monitor that the Trainer does not know of."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_") and name not in ("setup", "teardown"):
            return super().__getattribute__(name)
        return lambda *args, **options: getattr(self.monitor, name)(*args, **options)


class Failing(L.Callback):
    """It ends the training between two samples."""

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            raise KeyError("of the user")


class Counting(RankMonitor):
    """A user's own."""

    ends = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends += 1
        super().on_train_batch_end(*args)


def test_between_samples_only_hooks_of_the_user_are_called() -> None:
    monitor = Counting(every_n_steps=2)
    looks = Looks(monitor)
    fit(monitor, looks)

    assert looks.seen == [list(IDLE), ["on_train_batch_end"]]
    assert monitor.ends == 2
    assert not vars(monitor).keys() & set(IDLE)


def test_a_callback_of_the_user_can_pass_hooks_on_at_every_step() -> None:
    monitor = RankMonitor(every_n_steps=3)
    fit(Passing(monitor))

    assert monitor.latest is not None


def test_an_exception_gives_all_hooks_back() -> None:
    monitor = RankMonitor(every_n_steps=3)
    with pytest.raises(KeyError, match="of the user"):
        fit(monitor, Failing())

    assert not vars(monitor).keys() & set(IDLE)
