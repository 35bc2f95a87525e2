"""What monitors say at the start: what they watch, in how many samples, and what one of them costs."""

import logging
import re
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_lowrank import (
    CurvatureMonitor,
    DormantUnitsMonitor,
    Features,
    LossMonitor,
    Monitor,
    Probe,
    RankAdvisor,
    RankCollapseAlert,
    RankMonitor,
    watching,
)
from lightning_lowrank.measuring.allowances import Grant, Purse, Wish
from lightning_lowrank.measuring.clock import Clock
from lightning_lowrank.reports.announcing import FirstSample, num_samples, of_all, too_few
from tests.monitors import MONITORS
from tests.trainings import QUIET, Classifier


def said(caplog: pytest.LogCaptureFixture, *monitors: Monitor, **settings: Any) -> list[str]:
    """Start lines, in a training of 8 batches an epoch."""
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no curve")
        L.Trainer(**QUIET | {"logger": False} | settings, callbacks=list(monitors)).fit(Classifier())
    return [record.message.partition("lightning_lowrank ")[2] for record in caplog.records]


@pytest.mark.parametrize(
    ("settings", "steps", "samples"),
    [
        ({"max_epochs": 3}, 24, 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 9, 5),
        ({"max_epochs": 3, "max_steps": 7}, 7, 4),
        ({"max_steps": 11}, 11, 6),
        ({"max_epochs": 2, "limit_train_batches": 5}, 10, 5),
    ],
)
def test_the_start_line_has_the_samples_that_the_run_then_has(
    settings: dict[str, Any], steps: int, samples: int, caplog: pytest.LogCaptureFixture
) -> None:
    taken = []

    class Counting(RankMonitor):
        """Notes when a sample was taken."""

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            taken.append(self.latest.step if self.latest else -1)

    lines = said(caplog, Counting(every_n_steps=2), **settings)

    wanted = f"rank: gradient, weight and update at 2 sites every 2 steps: {samples} samples in {steps} steps"
    assert wanted in lines and len(set(taken) - {-1}) == samples


def test_one_place_and_one_step_are_told_in_the_singular(caplog: pytest.LogCaptureFixture) -> None:
    lines = said(caplog, DormantUnitsMonitor(every_n_steps=1), LossMonitor(), max_steps=4)

    assert "dormant: dormant at 1 site every step: 4 samples in 4 steps" in lines
    assert "step: step at the whole model every step: 4 samples in 4 steps" in lines


def test_what_nobody_knows_beforehand_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    validated = Probe("validation_feature", Features(stage="validation"), ["stable_rank"])
    odd = Probe("feature", Features(), ["stable_rank"], lambda step: step % 3 == 1)

    lines = said(caplog, Monitor([validated, odd]), max_steps=4)

    assert "monitor: validation_feature at 2 sites at every validation; feature at 2 sites as scheduled" in lines
    assert num_samples([validated, odd], 100) is None


@pytest.mark.parametrize("steps", [1, 100])
def test_too_few_samples_are_a_warning_that_says_what_to_do_and_no_failure(steps: int) -> None:
    monitor = RankMonitor(every_n_steps=50)

    with pytest.warns(UserWarning, match=r"samples? in .* steps? .* no curve.*every_n_steps.*max_overhead"):
        L.Trainer(**QUIET, logger=False, max_steps=steps, callbacks=[monitor]).fit(Classifier())

    assert monitor.failures == 0


def test_three_samples_are_no_reason_to_warn() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        L.Trainer(**QUIET, logger=False, max_steps=9, callbacks=[RankMonitor(every_n_steps=4)]).fit(Classifier())

    assert not [warning for warning in caught if "no curve" in str(warning.message)]


@pytest.mark.parametrize(("sample", "told"), [(0.03, "as long as 3 steps of training.* takes 6 % longer"), (0.009, "")])
def test_the_first_sample_is_told_where_the_run_will_spend_much_on_it(sample: float, told: str) -> None:
    now = [0.0]
    clock = Clock(now=lambda: now[0])
    clock.start()
    first = FirstSample([recorder.probe for recorder in RankMonitor(every_n_steps=50).recorders])
    lines = []
    for step in range(40):
        lines.append(first.step_begins(step, clock, 100))
        if step == 0:
            with clock.timed():
                now[0] += sample
        now[0] += 0.01

    found = [line for line in lines if line]
    assert len(found) == bool(told)
    assert not told or re.search(told, found[0])


class Exploding(Classifier):
    """Weights that become NaN at a step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.global_step == 3 else loss


def test_a_run_that_cannot_be_read_is_told_once_by_all_monitors_together() -> None:
    monitors = [RankMonitor(every_n_steps=1, alerts=None), DormantUnitsMonitor(every_n_steps=1, alerts=None)]
    monitors += [CurvatureMonitor(every_n_steps=1, alerts=None)]

    with pytest.warns(UserWarning, match="no number since") as caught:
        L.Trainer(**QUIET, logger=False, max_steps=8, callbacks=list(monitors)).fit(Exploding())

    ours = [str(warning.message) for warning in caught if "lightning_lowrank" in str(warning.message)]
    assert len([line for line in ours if "no number since step 3 (weights are NaN)" in line]) == 1
    assert monitors[0].no_number_since == 3 and monitors[0].failures > 0
    assert not [line for line in ours if "no number for" in line]


@pytest.mark.parametrize("name", MONITORS)
def test_every_monitor_takes_a_budget(name: str) -> None:
    kind = type(MONITORS[name]())
    needed = {"budget": 10_000} if kind is RankAdvisor else {}

    monitor = kind(max_overhead=0.02, **needed)  # type: ignore[call-arg]

    assert monitor.budget is not None and monitor.budget.share == 0.02


def test_a_checkpoint_that_nobody_writes_is_refused_at_the_start() -> None:
    net = torch.nn.Linear(4, 2)
    monitor = RankMonitor(every_n_steps=1, alerts=[RankCollapseAlert("weight", actions=["checkpoint"])])

    with (
        pytest.raises(ValueError, match="requests a checkpoint; give watching"),
        watching(net, torch.optim.SGD(net.parameters(), lr=0.1), monitor),
    ):
        pass


def test_a_loop_whose_length_is_told_has_it_in_the_start_line(caplog: pytest.LogCaptureFixture) -> None:
    net = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    with (
        caplog.at_level(logging.INFO, logger="lightning.pytorch"),
        watching(net, optimizer, RankMonitor(every_n_steps=5), max_steps=15) as watch,
        watch.batch(),
    ):
        watch.loss(net(torch.ones(3, 4)).sum()).backward()
        optimizer.step()

    assert "every 5 steps: 3 samples in 15 steps" in caplog.text


def granted(*seconds: float, taken: int = 0) -> Purse:
    """Several monitors after each was given some seconds of the last 500 of 600 steps."""
    purse = Purse(0.05)
    members = [purse.allowance(Wish(1.0, 0.0, 1), f"m{i}") for i in range(len(seconds))]
    purse.has_begun = True
    for one, some in zip(members, seconds, strict=True):
        one.plan(600)
        one.taken, one._last = taken, 90 * bool(taken)
        one.grant(Grant(now=100, rest=500, seconds=some, sample=0.02, step=0.01, first=110))
    return purse


def test_cadences_of_one_budget_are_told_in_one_line_by_what_they_cost() -> None:
    purse = granted(0.3, 0.1, taken=1)

    (line,) = of_all(purse)
    assert line.startswith("cadences for now, with 10 ms a step: m0 every ")
    for one in purse.members:
        cost = (
            f"20 ms a sample, {100 * 0.02 / 0.01 / (one.every or 0):.3g} % more time: {one.count(600)} samples in 600"
        )
        assert f"{one.name} every {one.every} steps ({cost} steps)" in line
    assert list(of_all(purse)) == []


def test_a_cadence_that_changes_is_told_with_the_one_before_and_one_that_hardly_does_is_not() -> None:
    purse = granted(0.3, 0.3, taken=1)
    assert len(list(of_all(purse))) == 1
    first, second = purse.members
    before = first.every

    first.grant(Grant(now=200, rest=400, seconds=0.05, sample=0.02, step=0.01, first=110))
    second.grant(Grant(now=200, rest=400, seconds=0.24, sample=0.02, step=0.01, first=110))

    assert list(of_all(purse)) == [
        f"cadences for now, with 10 ms a step: m0 every {first.every} steps instead of {before}"
    ]


def test_a_cadence_that_drifts_is_told_when_it_is_far_from_what_was_said_last() -> None:
    """A busy machine changed cadences dozens of times within seconds, and each was a line."""
    purse = granted(0.3, 0.3, taken=1)
    assert len(list(of_all(purse))) == 1
    drifting = purse.members[0]
    said, told = drifting.every, []
    for seconds in (0.2, 0.3, 0.2, 0.12, 0.2, 0.1):
        drifting.grant(Grant(now=100, rest=500, seconds=seconds, sample=0.02, step=0.01, first=110))
        told.append((drifting.every, list(of_all(purse))))

    far = [every for every, _ in told if every and said and every >= 2 * said]
    assert len({every for every, _ in told}) >= 4
    assert [line for _, lines in told for line in lines] == [
        f"cadences for now, with 10 ms a step: m0 every {far[0]} steps instead of {said}"
    ]


@pytest.mark.parametrize(
    ("taken", "what", "missing"), [(0, "left out of", "3 take 1"), (2, "no more samples in", "1 more take 0.33")]
)
def test_those_left_out_because_of_others_are_told_in_one_line(taken: int, what: str, missing: str) -> None:
    cost = f"(a sample takes 20 ms or 2 steps, {missing} %)"

    assert list(of_all(granted(0.0, 0.0, taken=taken))) == [
        f"{what} this run, as too little is left of the 5 % for all monitors together: m0 {cost}, m1 {cost}"
    ]


def test_what_fits_in_no_case_is_held_against_the_whole_budget() -> None:
    purse = Purse(0.05)
    for name, cost in (("dear", 17.0), ("one", 1.0)):
        purse.allowance(Wish(cost, 0.0, 1), name).plan(1)

    whole = "left out of this run, as all monitors together may take 5 % of 1 step"
    assert list(of_all(purse)) == [
        f"{whole}: dear (a sample takes 17 steps, 3 take 5100 %), one (a sample takes 1 step, 3 take 300 %)"
    ]
    assert too_few(1, 1).startswith("1 sample in 1 step is no curve. ")
