"""An alert comes before a run fails, and never in one that does not: real training in small. `benchmarks.alerts` has it
at length.
"""

from itertools import accumulate
from pathlib import Path
from statistics import fmean

import lightning as L
import pytest
from torch import nn
from torch.optim import AdamW

from benchmarks.alerts import written
from benchmarks.faults.nets import mlp, writer
from benchmarks.faults.page import ALLOWED, harms
from benchmarks.faults.trainings import Run, characters, classes, train
from lightning_lowrank import Monitor, RankCollapseAlert, RankMonitor


def failure(run: Run) -> int | None:
    """First of ten steps in a row at which half of what the loss had gained is lost again, as a mean of ten steps."""
    means = [fmean(run.loss[max(0, i - 9) : i + 1]) for i in range(len(run.loss))]
    best = list(accumulate(means, lambda low, mean: min(low, mean)))
    lost = [not mean <= low + max(0.5, (run.loss[0] - low) / 2) for mean, low in zip(means, best, strict=True)]
    return next((i for i in range(len(lost) - 9) if all(lost[i : i + 10])), None)


def often() -> Monitor:
    """The default rule on the stable rank of weights, for a run too short for its warm-up."""
    rule = RankCollapseAlert("weight", "stable_rank", drop=0.35, warm_up_samples=20)
    return RankMonitor("weights", "stable_rank", every_n_steps=5, alerts=[rule], detail="all")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
def test_weights_lose_their_rank_before_a_transformer_without_normalisation_diverges() -> None:
    L.seed_everything(0, verbose=False)
    run, monitor = Run(writer(nn.Identity), characters, AdamW, 1e-3, 1.025), often()

    train(run, 170, monitor)

    failed = failure(run)
    assert failed is not None and monitor.events
    assert monitor.events[0].step <= failed - 15


@pytest.mark.slow
def test_the_same_transformer_with_normalisation_and_a_steady_rate_gives_no_alarm() -> None:
    L.seed_everything(0, verbose=False)
    run, monitor = Run(writer(), characters, AdamW, 1e-3), often()

    train(run, 170, monitor)

    assert (failure(run), monitor.events) == (None, [])


@pytest.mark.slow
def test_an_mlp_on_digits_gives_no_alarm_by_default() -> None:
    L.seed_everything(0, verbose=False)
    run, monitor = Run(mlp(), classes, AdamW, 1e-3), RankMonitor(every_n_steps=20, detail="all")

    train(run, 600, monitor)

    assert (failure(run), monitor.events) == (None, [])


@pytest.mark.evidence
def test_the_chosen_rules_are_quiet_and_see_faults_that_harm() -> None:
    """Writes `docs/evidence/warnings.md`: half an hour on two cores, unless the trainings are in `runs/alerts`."""
    study, rules = written(Path("runs/alerts"), workers=2)

    seen = {case.what: study.seen(case, rules) for case in study.faulty if harms(study, case)}
    assert study.false_alarms(rules) <= ALLOWED
    told = {what for what, steps in seen.items() if all(step is not None for step in steps)}
    assert told >= {f"GPT, {fault}" for fault in ("rate ramp", "attention logits grow", "half precision overflows")}
