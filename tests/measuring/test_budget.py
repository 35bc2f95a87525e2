"""A budget: what it chooses, that it keeps to it, and how that is told. All seconds are made up, so that no machine is
too busy for it.
"""

import copy
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch import distributed as dist

from lightning_lowrank import Budget, Gradients, Monitor, Probe, RankMonitor, Updates
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.clock import Clock
from lightning_lowrank.measuring.schedules import COLD, WARM_UP, cadence
from tests.processes import together
from tests.trainings import Classifier, MemoryLogger, Validated

# The second run has no ModelCheckpoint.
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")

WARM_UP_SAMPLES = [0, 20, 30, 40, 50, 60, 70, 80, 90]
Seconds = Callable[[int], float]


def run(
    budget: Budget, steps: Iterable[int], *, sample: Seconds, step: Seconds, idle: float = 0.0, team: Team | None = None
) -> list[int]:
    """Steps at which a training whose seconds are made up would be sampled."""
    own = total = 0.0
    due = []
    for i in steps:
        budget.observe(i, own, total, team or Team())
        due += [i] if budget(i) else []
        ours = idle + (sample(i) if budget(i) else 0.0)
        own, total = own + ours, total + ours + step(i)
    return due


def constantly(seconds: float) -> Seconds:
    return lambda i: seconds


def decided(sample: float = 0.0103, step: float = 0.02, share: float = 0.01, team: Team | None = None) -> Budget:
    """A budget after its warm-up."""
    run(budget := Budget(share), range(WARM_UP + 1), sample=constantly(sample), step=constantly(step), team=team)
    return budget


@pytest.mark.parametrize("idle", [0.0, 2e-6, 2e-5])
@pytest.mark.parametrize("sample", [3e-3, 1e-2, 2.5e-2])
@pytest.mark.parametrize("share", [0.005, 0.01, 0.05])
def test_what_is_spent_after_the_warm_up_is_near_the_budget(share: float, sample: float, idle: float) -> None:
    budget = Budget(share)

    run(budget, range(3000), sample=constantly(sample), step=constantly(0.02), idle=idle)

    assert budget.num_samples >= 5
    assert 0.4 <= budget.overhead / (100 * share) <= 1.0


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
@pytest.mark.parametrize("sample", [1e-4, 1.0])
@pytest.mark.parametrize("idle", [0.0, 1e-3])
def test_a_cadence_keeps_the_promise_where_it_can_be_kept(share: float, sample: float, idle: float) -> None:
    every = cadence(share, sample=sample, step=0.1, idle=idle)
    spent = sample / every + idle

    assert spent / 0.1 <= share or idle / 0.1 > 0.8 * share


def test_the_samples_of_the_warm_up_are_at_stated_steps() -> None:
    assert run(Budget(0.01), range(WARM_UP), sample=constantly(1.0), step=constantly(0.01)) == WARM_UP_SAMPLES


def test_once_chosen_the_cadence_is_fixed() -> None:
    budget = Budget(0.05)

    due = run(
        budget, range(1000), sample=lambda i: 0.0094 if i < 200 else 10.0, step=lambda i: 0.02 if i < 300 else 1e-4
    )

    assert due[len(WARM_UP_SAMPLES) :] == list(range(WARM_UP + 12, 1000, 12))


def test_whether_a_step_is_due_does_not_depend_on_what_was_asked_before() -> None:
    budget = decided()
    once = [budget(step) for step in range(500)]

    assert [budget(step) for step in reversed(range(500))] == once[::-1]


def test_the_cold_steps_count_for_nothing() -> None:
    warm = decided()
    run(
        cold := Budget(0.01),
        range(101),
        sample=lambda i: 0.0103 if i else 9.0,
        step=lambda i: 0.02 if i >= COLD else 5.0,
    )

    assert cold.every == warm.every


@pytest.mark.parametrize("what", ["sample", "step"])
def test_an_outlier_changes_nothing(what: str) -> None:
    slow_at_60: dict[str, Seconds] = {"sample": constantly(0.0103), "step": constantly(0.02)}
    slow_at_60[what] = lambda i: 7.0 if i == 60 else {"sample": 0.0103, "step": 0.02}[what]

    run(budget := Budget(0.01), range(101), **slow_at_60)

    assert budget.every == decided().every


def test_dearer_samples_and_faster_steps_mean_fewer_samples() -> None:
    every = [
        decided(sample=0.01),
        decided(sample=0.03),
        decided(sample=0.03, step=0.01),
        decided(sample=0.03, step=0.01, share=0.002),
    ]

    assert [budget.every for budget in every] == sorted({budget.every for budget in every})


def test_a_run_that_is_resumed_keeps_the_cadence() -> None:
    whole, first, second = Budget(0.05), Budget(0.05), Budget(0.05)
    seconds: dict[str, Seconds] = {"sample": constantly(0.01), "step": constantly(0.02)}
    run(first, range(163), **seconds)

    second.load_state_dict(first.state_dict())
    second.begin()

    expected = [step for step in run(whole, range(400), **seconds) if step >= 163]
    assert run(second, range(163, 400), sample=constantly(3.0), step=constantly(0.02)) == expected


def test_a_run_that_is_resumed_in_its_warm_up_begins_it_again() -> None:
    first, second = Budget(0.05), Budget(0.05)
    run(first, range(63), sample=constantly(0.01), step=constantly(0.02))

    second.load_state_dict(first.state_dict())
    second.begin()

    assert first.state_dict() == {}
    due = run(second, range(63, 163), sample=constantly(0.01), step=constantly(0.02))
    assert due == [63 + step for step in WARM_UP_SAMPLES]


def test_another_share_is_chosen_for_anew() -> None:
    other = Budget(0.02)

    other.load_state_dict(decided(share=0.01).state_dict())

    assert other.every is None


def test_the_first_sample_of_a_resumed_process_is_not_counted() -> None:
    budget = Budget(0.05)
    budget.load_state_dict(decided(share=0.05).state_dict())
    assert budget.every is not None
    first = WARM_UP + budget.every

    run(
        budget,
        range(first - 1, first + 10 * budget.every),
        sample=lambda i: 50.0 if i == first else 0.01,
        step=constantly(0.02),
    )

    assert budget.num_samples == 9
    assert budget.overhead < 5.0


def test_too_much_is_exceeded_only_after_five_samples() -> None:
    budget = Budget(0.05)
    exceeded = []

    def sample(step: int) -> float:
        exceeded.append((budget.num_samples, budget.exceeded))
        return 0.01 if step < WARM_UP else 0.1

    run(budget, range(400), sample=sample, step=constantly(0.02))

    assert {num_samples for num_samples, too_much in exceeded if too_much} == set(range(5, exceeded[-1][0] + 1))


class Made:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(MemoryLogger):
    """Takes made-up seconds for each report of a monitor."""

    def __init__(self, time: Made, seconds: Seconds) -> None:
        super().__init__()
        self.time, self.seconds = time, seconds

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        assert step is not None
        self.time.now += self.seconds(step) if any(tag.startswith("lowrank/") for tag in metrics) else 0.0


class Timed(Validated):
    """A step takes 20 made-up milliseconds."""

    def __init__(self, time: Made) -> None:
        super().__init__()
        self.time = time

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.time.now += 0.02
        return super().training_step(batch, batch_idx)


def trained(monitor: Monitor, steps: int, seconds: Seconds = lambda step: 0.0094, **options: Any) -> MemoryLogger:
    """What was logged in a run whose seconds are made up."""
    time = Made()
    logger = Slow(time, seconds)
    monitor.watch.journal.clock = Clock(now=time)
    settings = {
        "max_steps": steps,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    resume = options.pop("resume", None)
    callbacks = [monitor, *options.pop("callbacks", [])]
    L.Trainer(**settings | options, logger=logger, callbacks=callbacks, limit_val_batches=0).fit(
        Timed(time), ckpt_path=resume
    )
    return logger


def sampled(logger: MemoryLogger) -> list[int]:
    return list(logger.curve("lowrank/rank_time_ms"))


def test_a_training_is_sampled_at_the_cadence_that_was_chosen() -> None:
    logger = trained(monitor := RankMonitor(max_overhead=0.05, detail="all"), 200)

    assert monitor.budget is not None and monitor.budget.every == 12
    assert sampled(logger) == [*WARM_UP_SAMPLES, *range(112, 200, 12)]


def test_cadence_and_cost_since_the_warm_up_are_curves() -> None:
    logger = trained(RankMonitor(max_overhead=0.05, detail="all"), 200)

    assert logger.curve("lowrank/rank_every_n_steps") == dict.fromkeys(range(112, 200, 12), 12.0)
    # Before the n-th sample 12 n steps have passed, with n - 1 samples.
    expected = {100 + 12 * n: 100 * (n - 1) * 0.0094 / (12 * n * 0.02) for n in range(1, 9)}
    torch.testing.assert_close(logger.curve("lowrank/rank_overhead_percent_after_warm_up"), expected)


def test_what_was_chosen_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    with caplog.at_level(logging.INFO):
        trained(RankMonitor(max_overhead=0.05, detail="all"), 150)

    said = [r.getMessage() for r in caplog.records if "lightning_lowrank rank" in r.getMessage()]
    assert "for at most 5 % more time, measured in the first 100 steps" in said[0]
    assert "every 12 steps from now on: a sample takes 9.4 ms, a step 20 ms, 5 % more time is allowed" in said[1]
    assert len(said) == 2


def test_a_later_violation_warns_once_and_changes_nothing() -> None:
    monitor = RankMonitor(max_overhead=0.05, detail="all")

    with pytest.warns(UserWarning, match="lightning_lowrank") as caught:
        logger = trained(monitor, 300, lambda step: 0.0094 if step < 150 else 0.1)

    ours = [str(w.message) for w in caught if "lightning_lowrank" in str(w.message)]
    assert len(ours) == 1
    assert "% more time since the warm-up; 5 % was allowed. The cadence stays at every 12 steps" in ours[0]
    assert sampled(logger) == [*WARM_UP_SAMPLES, *range(112, 300, 12)]
    assert monitor.failures == 0


@pytest.mark.parametrize("stop", [64, 152])
def test_a_training_that_is_resumed_samples_at_its_cadence(stop: int, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=stop)
    trained(RankMonitor(max_overhead=0.05, detail="all"), stop, callbacks=[checkpoint], enable_checkpointing=True)

    resumed = trained(
        RankMonitor(max_overhead=0.05, detail="all"), 210, constantly(0.0278), resume=checkpoint.best_model_path
    )

    # After a warm-up of its own, with dearer samples, every 35 steps.
    anew = [64 + step for step in WARM_UP_SAMPLES] + [64 + WARM_UP + 35]
    assert sampled(resumed) == (list(range(160, 210, 12)) if stop == 152 else anew)


def test_another_training_is_measured_anew() -> None:
    monitor = RankMonitor(max_overhead=0.05, detail="all")
    trained(monitor, 120)

    logger = trained(monitor, 150, constantly(0.0278))

    assert sampled(logger) == [*WARM_UP_SAMPLES, 135]


def test_micro_batches_are_no_steps() -> None:
    logger = trained(monitor := RankMonitor(max_overhead=0.05, detail="all"), 120, accumulate_grad_batches=2)

    assert monitor.budget is not None and monitor.budget.every == 6
    assert sampled(logger) == [*WARM_UP_SAMPLES, 106, 112, 118]


def test_the_probes_of_a_monitor_may_share_a_budget() -> None:
    budget = Budget(0.05)
    probes = [
        Probe("gradient", Gradients(), ["stable_rank"], budget),
        Probe("update", Updates(), ["effective_rank"], budget),
    ]

    logger = trained(Monitor(probes, detail="all"), 150)

    curves = [logger.curve(f"monitor/{name}_median") for name in ("gradient_stable_rank", "update_effective_rank")]
    assert [list(curve) for curve in curves] == [list(logger.curve("lowrank/monitor_time_ms"))] * 2


def test_a_copied_monitor_has_one_budget_of_its_own() -> None:
    original = RankMonitor(max_overhead=0.05, detail="all")

    copied = copy.deepcopy(original)

    assert copied.budget is not original.budget
    assert all(recorder.probe.schedule is copied.budget for recorder in copied.recorders)


def test_two_monitors_may_not_share_a_budget() -> None:
    budget = Budget(0.05)
    monitors = [
        Monitor([Probe("gradient", Gradients(), ["stable_rank"], budget)], name=name, detail="all") for name in "ab"
    ]

    with pytest.raises(ValueError, match="'a_monitor' and 'b_monitor' share one Budget"):
        trained(monitors[0], 1, callbacks=monitors[1:])


def test_watching_within_a_budget_changes_nothing() -> None:
    weights = []
    for callbacks in ([], [RankMonitor(max_overhead=0.05, detail="all")]):
        L.seed_everything(3, verbose=False)
        settings = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
        }
        L.Trainer(max_steps=130, callbacks=callbacks, **settings).fit(module := Classifier())
        weights.append(module.state_dict())

    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_validation_is_neither_training_nor_ours() -> None:
    clock = Clock(now=(time := Made()))
    clock.start()
    time.now += 3
    clock.pause()
    with clock.timed():
        time.now += 5
    clock.resume()

    assert (clock.total, clock.own, clock.take_sample()) == (3, 0, 5)


def test_what_is_nested_is_counted_once() -> None:
    clock = Clock(now=(time := Made()))
    clock.start()
    with clock.timed():
        time.now += 1
        with clock.timed():
            time.now += 2
    time.now += 6

    assert (clock.own, clock.total, clock.percent) == (3, 9, 50)


def steps(clock: Clock, time: Made, step: Callable[[int], float], *, sample: float = 5, every: int = 10) -> None:
    """A hundred of them, with a sample in every tenth."""
    for i in range(100):
        clock.step_begins()
        if i % every == 0:
            clock.samples()
            with clock.timed():
                time.now += sample
        time.now += step(i)
    clock.step_begins()


def test_steps_that_are_slower_after_a_sample_are_ours() -> None:
    """Each sample makes its own step and the next one slower. The first is no measure, and the last is not over: they
    count as the other eight.
    """
    clock = Clock(now=(time := Made()))
    clock.start()
    steps(clock, time, lambda i: 1 + {0: 0.25, 1: 0.5}.get(i % 10, 0))

    assert clock.own == pytest.approx(10 * (5 + 0.75))
    assert clock.take_sample() == 50


def test_steps_that_nobody_has_looked_at_are_no_measure_of_slow_steps() -> None:
    clock = Clock(now=(time := Made()))
    clock.start()
    for i in range(100):
        clock.rests() if i % 10 == 5 else clock.step_begins()
        if i % 10 == 0:
            clock.samples()
        time.now += 3 if i % 10 == 0 else 1

    assert clock.own == 0


def test_steps_that_are_slower_for_another_reason_are_not_ours() -> None:
    """Long steps at other times, ends of epochs, other monitors; and no step is far from a sample
    every other step.
    """
    clock, other = Clock(now=(time := Made())), Clock(now=time)
    clock.start()
    other.start()

    def step(i: int) -> float:
        if i % 10 == 0:
            with other.timed():
                time.now += 7
        if i % 10 == 1:
            clock.interrupt()
            return 1 + 3
        return 1 + 20 * (i in (5, 33, 41))

    steps(clock, time, step)
    often = Clock(now=time)
    often.start()
    steps(often, time, lambda i: 1 + 0.5 * (i % 2), every=2)

    assert clock.own == 50
    assert often.own == 50 * 5


class Event:
    """Made on a device that is a second late for each event."""

    device = Made()

    def record(self) -> None:
        Event.device.now += 1
        self.at = Event.device.now

    def query(self) -> bool:
        return Event.device.now > self.at

    def elapsed_time(self, end: "Event") -> float:
        assert end.query()
        return 1000 * (end.at - self.at)


def test_seconds_of_a_device_count_when_it_is_past_them() -> None:
    clock = Clock(now=Made(), event=Event)
    clock.start(on_device=True)
    known = []
    for _ in range(3):
        with clock.timed():
            Event.device.now += 4
        known.append(clock.own)

    assert known == [0, 5, 10]


def chosen(rank: int, size: int, root: Path) -> int | None:
    """The cadence in processes of which one is slower at sampling, one at training."""
    dist.init_process_group("gloo", rank=rank, world_size=size)
    budget = decided(sample=[0.01, 0.03][rank], step=[0.02, 0.03][rank], team=Team(rank, size))
    dist.destroy_process_group()
    return budget.every


@pytest.mark.slow
def test_processes_agree_on_the_longest_cadence(tmp_path: Path) -> None:
    alone = [decided(sample=0.01, step=0.02).every, decided(sample=0.03, step=0.03).every]

    assert together(chosen, tmp_path) == [max(filter(None, alone))] * 2


def test_steps_far_from_a_sample_are_not_looked_at_once_the_cadence_is_fixed() -> None:
    budget = Budget(0.05)
    before = [step for step in range(300) if budget.rests(step)]
    budget.load_state_dict({"share": 0.05, "every": 50, "decided": 100})

    looked_at = [step for step in range(100, 300) if not budget.rests(step)]

    assert before == [] and looked_at == [150, 151, 200, 201, 250, 251]
