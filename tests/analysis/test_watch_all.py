"""Every monitor under one budget, in real trainings."""

import logging
import re
import warnings
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lowrank import Monitor, RankMonitor, watch_all
from lightning_lowrank.measuring.allowances import Allowance
from tests.trainings import QUIET, Classifier, MemoryLogger


class Wide(Classifier):
    """A step that takes some milliseconds."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        )


def watched(monitors: list[Monitor], num_steps: int) -> tuple[Classifier, MemoryLogger]:
    """A training by them, without warnings of few samples."""
    logger = MemoryLogger()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no curve")
        torch.manual_seed(0)
        module = Wide()
        L.Trainer(**QUIET, logger=logger, max_steps=num_steps, callbacks=[*monitors]).fit(module)
    return module, logger


def test_ranks_have_three_samples_in_200_steps_and_who_is_left_out_says_what_it_takes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        _, logger = watched(watch_all(), 200)

    said = [record.message for record in caplog.records if "lightning_lowrank" in record.message]
    assert len(logger.curve("rank/weight_stable_rank_median")) >= 3
    assert any("ntk: left out of this run: a sample takes about 150 steps" in line for line in said)
    assert any(line.endswith("router: left out of this run: RouterMonitor finds no router") for line in said)
    places = "rank: gradient, weight and update at 3 sites within 5 % more time for all monitors together"
    assert any(line.endswith(f"{places}: at least 3 samples in 200 steps") for line in said)
    assert any(re.search(r"rank: every .* more time is allowed: \d+ samples in 200 steps$", line) for line in said)
    left_out = [line for line in said if ": left out of this run: " in line]
    assert len({line.partition(":")[0] for line in left_out}) == len(left_out)
    assert not logger.tags() & {"ntk/velocity"}


def test_each_that_is_not_left_out_has_three_samples() -> None:
    monitors = watch_all(0.5)
    _, logger = watched(monitors, 300)

    at_work = [one for one in monitors if one.latest is not None and one.budget and not one.budget.is_left_out]
    numbers = {one.label: len(logger.curve(f"lowrank/{one.label}_failures")) for one in at_work}
    assert len(numbers) >= 4 and min(numbers.values()) >= 3, numbers


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_a_run_that_is_resumed_keeps_the_cadence_of_each(tmp_path: Path) -> None:
    first, second = watch_all(0.5), watch_all(0.5)
    trainer = L.Trainer(**QUIET, logger=MemoryLogger(), max_steps=300, callbacks=[*first])
    trainer.fit(Wide())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    L.Trainer(**QUIET, logger=MemoryLogger(), max_steps=330, callbacks=[*second]).fit(
        Wide(), ckpt_path=tmp_path / "run.ckpt", weights_only=True
    )

    kept = [
        (one.budget.every, two.budget.every)
        for one, two in zip(first, second, strict=True)
        if one.budget and two.budget and one.latest and not one.budget.is_left_out
    ]
    assert len(kept) >= 4 and all(before == after is not None for before, after in kept)


def test_a_training_is_the_same_with_all_of_them() -> None:
    with_all, _ = watched(watch_all(), 60)
    without, _ = watched([], 60)

    for one, other in pairwise([with_all, without]):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert one.losses == other.losses


def test_each_has_a_budget_of_its_own_out_of_one_purse() -> None:
    monitors = watch_all(0.1)

    budgets = [monitor.budget for monitor in monitors]
    assert all(isinstance(budget, Allowance) for budget in budgets) and len(set(map(id, budgets))) == len(budgets)
    assert isinstance(monitors[0], RankMonitor) and monitors[0].budget is monitors[0].recorders[0].probe.schedule


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="a share of the training time above 0 and below 1"):
        watch_all(share)
