"""What follows from alerts in real training: words, files, calls, checkpoints, and the end of a run only where it was
asked for.
"""

import json
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lowrank import (
    Alert,
    AlertError,
    AlertEvent,
    Features,
    Monitor,
    Probe,
    RankCollapseAlert,
    RankMonitor,
)
from tests.processes import together
from tests.trainings import Classifier, MemoryLogger, Validated

# Eight steps an epoch.
QUICK: dict[str, Any] = {"warm_up_samples": 2, "for_samples": 2, "keep_samples": 1, "cooldown_steps": 0}
# No rank is that high: it fires at the fourth sample; the x-axis begins at 0.
FIRES_AT, STEPS = 3, 4


def always(*actions: str, **options: Any) -> Alert:
    """A rule that fires at the fourth sample, at both layers."""
    return Alert("weight_stable_rank", below=1000.0, actions=list(actions), **(QUICK | options))  # type: ignore[arg-type]


def monitor(*rules: Alert, **options: Any) -> Monitor:
    return RankMonitor(
        ["gradients", "weights"], ["stable_rank"], every_n_steps=1, alerts=list(rules), **options, detail="all"
    )


def fit(
    *callbacks: L.Callback, module: L.LightningModule | None = None, logger: Any = False, **options: Any
) -> L.Trainer:
    """Two epochs of eight steps, unless told otherwise."""
    L.seed_everything(0, verbose=False)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
    }
    trainer = L.Trainer(**quiet | options, logger=logger, callbacks=list(callbacks))
    trainer.fit(module or Classifier())
    return trainer


def test_a_warning_is_given_once_per_transition() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(monitor(always("warn")))

    ours = [str(w.message) for w in caught if " alert: " in str(w.message)]
    assert len(ours) == 1
    assert "weight_stable_rank at 2 of 2 sites since step 2" in ours[0]


def test_levels_are_a_curve_of_their_own() -> None:
    logger = MemoryLogger()

    fit(monitor(always("log")), logger=logger, max_steps=6)

    assert logger.curve("lowrank/alert/weight_stable_rank_below") == {0: 0.0, 1: 0.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}


def test_events_stand_beside_the_logs_and_in_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    watched = monitor(always("log"))

    fit(watched, logger=logger)

    (line,) = (Path(logger.log_dir) / "lowrank_alerts_rank.jsonl").read_text().splitlines()
    assert {"step": FIRES_AT, "state": "firing", "num_firing": 2}.items() <= json.loads(line).items()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (text,) = events.Tensors("lowrank/rank_alerts/text_summary")
    assert watched.events[0].message in text.tensor_proto.string_val[0].decode()


class Run:
    """What wandb's run has, as far as alerts know it."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []

    def alert(self, **options: Any) -> None:
        self.alerts.append(options)


class LoggerOfRun(MemoryLogger):
    """One whose experiment can alert."""

    def __init__(self) -> None:
        super().__init__()
        self.experiment = Run()  # type: ignore[misc]


def test_wandb_is_told_where_there_is_its_logger() -> None:
    logger = LoggerOfRun()

    fit(monitor(always("wandb", severity="error")), logger=[MemoryLogger(), logger])

    (told,) = logger.experiment.alerts
    assert told["level"] == "ERROR"
    assert len(told["title"]) <= 63 and "stable_rank" in told["text"]


def patiently() -> Iterator[None]:
    """For as long as wandb's own process may take to write, on a busy machine."""
    for _ in range(120):
        yield
        time.sleep(0.5)


@pytest.mark.filterwarnings("ignore")  # of wandb
def test_wandb_itself_takes_the_alert(tmp_path: Path) -> None:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, offline=True, settings=wandb.Settings(console="off", silent=True))
    watched = monitor(always("wandb"))

    fit(watched, logger=logger)
    wandb.finish()

    assert watched.failures == 0
    (record,) = (tmp_path / "wandb").rglob("*.wandb")
    assert any(watched.events[0].title.encode() in record.read_bytes() for _ in patiently())


def test_a_checkpoint_of_the_step_is_saved_and_can_be_resumed(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)

    fit(monitor(always("checkpoint")), logger=logger)

    (saved,) = Path(logger.log_dir).rglob("*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == STEPS


def test_stop_ends_training_after_the_batch() -> None:
    trainer = fit(monitor(always("stop")))

    assert trainer.global_step == STEPS


def test_raise_ends_the_run_with_the_message() -> None:
    watched = monitor(always("raise"))

    with pytest.raises(AlertError, match="weight_stable_rank at 2 of 2 sites"):
        fit(watched)

    assert watched.events[0].step == FIRES_AT


def test_other_rules_have_acted_before_one_raises(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)

    with pytest.raises(AlertError):
        fit(monitor(always("raise", "log", name="one"), always("checkpoint", "log", name="two")), logger=logger)

    assert len(list(tmp_path.rglob("*.ckpt"))) == 1
    assert len((Path(logger.log_dir) / "lowrank_alerts_rank.jsonl").read_text().splitlines()) == 2


def test_a_rule_on_validation_acts_after_the_loop() -> None:
    rule = Alert("validation_feature_stable_rank", below=1000.0, actions=["stop"], **QUICK)
    probe = Probe("validation_feature", Features(stage="validation"), ["stable_rank"])

    trainer = fit(
        Monitor([probe], alerts=[rule], detail="all"), module=Validated(), max_epochs=9, num_sanity_val_steps=0
    )

    assert trainer.current_epoch == 4


def test_a_function_is_called_off_the_training_thread() -> None:
    seen: list[tuple[str, AlertEvent]] = []

    fit(monitor(always(call=lambda event: seen.append((threading.current_thread().name, event)))))

    ((thread, event),) = seen
    assert thread != threading.main_thread().name
    assert (event.step, event.state) == (FIRES_AT, "firing")


def broken(event: AlertEvent) -> None:
    """What a user's function may do."""
    raise SystemExit("the mail server is down")


def hangs(event: AlertEvent) -> None:
    """What another may."""
    time.sleep(60)


@pytest.mark.parametrize(("function", "words"), [(broken, "raised SystemExit"), (hangs, "took more than 0.2 s")])
def test_a_function_that_fails_or_hangs_costs_a_warning_and_nothing_else(function: Any, words: str) -> None:
    alone, module, begun = Classifier(), Classifier(), time.monotonic()
    module.load_state_dict(alone.state_dict())
    fit(module=alone)
    watched = monitor(always(call=function, call_timeout=0.2))

    with pytest.warns(UserWarning, match=words):
        fit(watched, module=module)

    assert time.monotonic() - begun < 30
    assert watched.failures == 1
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), module.parameters(), strict=True))


def test_a_function_that_hangs_is_not_called_again() -> None:
    calls: list[int] = []
    over = threading.Event()

    def late(event: AlertEvent) -> None:
        calls.append(event.step)
        over.wait(60)

    flapping = [always(call=late, call_timeout=0.01, name=f"rule{i}", warm_up_samples=2 + 4 * i) for i in range(3)]

    class Slow(Classifier):
        """Long enough for the time to be over."""

        def on_train_batch_end(self, *args: Any) -> None:
            time.sleep(0.05)

    with pytest.warns(UserWarning, match="is not called again"):
        fit(monitor(*flapping), module=Slow())
    over.set()

    assert calls == [FIRES_AT]


class Full(MemoryLogger):
    """A run whose alerts cannot be sent."""

    @property
    def experiment(self) -> Any:
        return self

    def alert(self, **options: Any) -> None:
        raise OSError("no space left")


def test_an_action_that_fails_costs_a_warning_and_the_others_are_done() -> None:
    watched = monitor(always("wandb", "stop"))

    with pytest.warns(UserWarning, match="no space left"):
        trainer = fit(watched, logger=Full())

    assert trainer.global_step == STEPS


def test_a_checkpoint_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")

    with pytest.warns(UserWarning, match="an action of an alert failed"):
        trainer = fit(monitor(always("checkpoint")), default_root_dir=tmp_path)

    assert trainer.global_step == 16


@pytest.mark.parametrize("module", [Classifier, Validated])
def test_alerts_leave_training_as_it_was_bit_for_bit(module: type[Classifier], tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    alone, watched = module(), module()
    watched.load_state_dict(alone.state_dict())
    fit(module=alone)
    state = torch.get_rng_state()

    rules = [always("log", "wandb", "checkpoint", name="one", call=lambda event: None), RankCollapseAlert("gradient")]
    fit(monitor(*rules), module=watched, logger=CSVLogger(tmp_path))

    assert watched.losses == alone.losses
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), watched.parameters(), strict=True))


def test_defaults_come_with_the_preset_and_can_be_left_out() -> None:
    assert {event.rule for event in RankMonitor(detail="all").events} == set()
    logger, bare = MemoryLogger(), MemoryLogger()

    fit(RankMonitor(every_n_steps=4, detail="all"), logger=logger)
    fit(RankMonitor(every_n_steps=4, alerts=None, detail="all"), logger=bare)

    assert "lowrank/alert/weight_stable_rank_drop" in logger.curves()
    assert [tag for tag in bare.curves() if "alert" in tag] == []


def test_two_monitors_with_defaults_have_alerts_of_their_own() -> None:
    logger = MemoryLogger()

    fit(
        RankMonitor(every_n_steps=4, detail="all"),
        RankMonitor(every_n_steps=4, name="second", detail="all"),
        logger=logger,
    )

    tags = {tag for tag in logger.curves() if "/alert/" in tag}
    assert {"lowrank/alert/weight_stable_rank_drop", "lowrank/alert/second_weight_stable_rank_drop"} <= tags


def test_two_monitors_may_not_share_the_name_of_a_rule() -> None:
    second = monitor(always("log", name="mine"), name="second")

    with pytest.raises(ValueError, match=r"would both write \['mine'\]"):
        fit(monitor(always("log", name="mine")), second)


def test_sites_that_fit_nothing_are_refused_before_training() -> None:
    module = Classifier()

    with pytest.raises(ValueError, match=r"matches nothing; weight_stable_rank has \['net.0.weight', 'net.2.weight'\]"):
        fit(monitor(always(sites="blocks.*")), module=module)

    assert module.losses == []


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_run_that_is_resumed_gives_the_events_of_one_that_never_stopped(epochs: int, tmp_path: Path) -> None:
    """At the end of an epoch it is pending, firing, or over."""

    def watched() -> Monitor:
        rule = always("log", warm_up_samples=3, for_samples=7)
        slow = RankCollapseAlert("weight", drop=0.01, for_samples=5, warm_up_samples=2, cooldown_steps=9, name="slow")
        return monitor(rule, slow)

    whole, first, second = watched(), watched(), watched()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* alert: ")
        fit(whole, max_epochs=4)
        fit(first, ModelCheckpoint(tmp_path), max_epochs=epochs, enable_checkpointing=True)
        L.seed_everything(0, verbose=False)
        (saved,) = tmp_path.glob("*.ckpt")
        quiet = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
        }
        L.Trainer(**quiet, max_epochs=4, callbacks=[second]).fit(Classifier(), ckpt_path=saved)

    steps = [(event.rule, event.step, event.state) for event in whole.events]
    assert ("weight_stable_rank_below", 9, "firing") in steps
    assert [(event.rule, event.step, event.state) for event in second.events][: len(first.events)] == steps[
        : len(first.events)
    ]
    assert ("weight_stable_rank_below", 9, "firing") in [
        (event.rule, event.step, event.state) for event in second.events
    ]


def test_another_run_begins_anew() -> None:
    watched = monitor(always("log"))

    fit(watched)
    fit(watched)

    assert [event.step for event in watched.events] == [FIRES_AT]


CONFIG = """
model: tests.trainings.Classifier
trainer:
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    class_path: lightning_lowrank.RankMonitor
    init_args:
      every_n_steps: 1
      alerts:
        - quantity: weight_stable_rank
          below: 1000.0
          quorum: 0.5
          warm_up_samples: 2
          actions: [warn, stop]
          call: tests.reports.test_alert_actions.noted
        - class_path: lightning_lowrank.RankCollapseAlert
          init_args:
            source: gradient
            drop: 0.95
"""
NOTED: list[AlertEvent] = []


def noted(event: AlertEvent) -> None:
    NOTED.append(event)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's own, about jsonargparse
def test_rules_can_be_written_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(tmp_path / "config.yaml")])

    with pytest.warns(UserWarning, match="weight_stable_rank at 2 of 2 sites"):
        cli = LightningCLI(save_config_callback=None)

    assert cli.trainer.global_step == 5
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, Monitor))
    assert [event.rule for event in callback.events] == ["weight_stable_rank_below"]


def stopped(rank: int, size: int, root: Path) -> tuple[int, list[int], int]:
    """Each process has other data and other loggers, and the first one's checkpoint cannot be written."""
    watched = monitor(always("stop", "checkpoint", "log", "wandb"))
    (root / "checkpoints").write_text("a file where a folder should be")
    warnings.simplefilter("ignore")
    trainer = fit(
        watched, logger=[LoggerOfRun()], strategy="ddp", accelerator="cpu", devices=size, default_root_dir=root
    )
    return trainer.global_step, [event.step for event in watched.events], len(list(root.rglob("*.ckpt")))


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    assert together(stopped, tmp_path) == [(STEPS, [FIRES_AT], 0)] * 2
