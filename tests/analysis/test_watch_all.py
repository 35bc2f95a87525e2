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


def test_ranks_have_three_samples_in_200_steps_and_few_lines_say_who_is_left_out_and_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        _, logger = watched(watch_all(), 200)

    said = [record.message.partition("lightning_lowrank ")[2] for record in caplog.records]
    ours = [line for line in said if line.startswith("watch_all: ")]
    assert (
        len(logger.curve("rank/weight_stable_rank_median")) >= 3
        and len([line for line in said if line and "instead of" not in line]) < 10
    )
    assert ours[0].startswith(
        "watch_all: at most 5 % more time for rank (gradient, weight and update at 3 sites), step ("
    )
    assert ours[0].endswith("The first 3 samples of rank and step are taken even if that takes longer")
    absent = "as there is nothing to watch: attention (AttentionMonitor finds no attention among ["
    assert absent in ours[1] and ours[1].endswith("router (RouterMonitor finds no router)")
    dear = r"as all monitors together may take 5 % of 200 steps: .*ntk \(a sample takes 150 steps, 3 take 225 %\)"
    assert re.search(dear, ours[2])
    assert any(re.search(r"rank every .* more time: \d+ samples in 200 steps\)", line) for line in ours)
    left_out = [name for line in ours if "left out" in line for name in re.findall(r"(\w+) \(", line)]
    assert len(set(left_out)) == len(left_out) >= 4
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
