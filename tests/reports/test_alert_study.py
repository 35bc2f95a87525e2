"""How trainings are judged from outside, on curves written by hand: when a loss shows a fault, harm, first alarms."""

import math

from benchmarks.faults.judging import Column, Outcome, first, harm, shows, steps
from benchmarks.faults.recording import by_quantity
from lightning_lowrank import Alert

HEALTHY = [dict.fromkeys(range(60), 2.0 + 0.01 * seed) for seed in range(3)]


def test_a_loss_shows_a_fault_from_the_first_of_ten_steps_above_the_healthy_ones() -> None:
    bad = {i: 2.0 if i < 30 else 2.5 for i in range(60)}
    short = {i: 2.5 if 30 <= i < 39 else 2.0 for i in range(60)}
    nan = {i: 2.0 if i < 40 else math.nan for i in range(60)}

    assert [shows(loss, HEALTHY) for loss in (bad, short, nan, HEALTHY[2])] == [30, None, 40, None]


def test_harm_is_a_held_out_loss_that_is_worse_twice_in_a_row() -> None:
    healthy = dict.fromkeys(range(0, 100, 25), 2.0)

    assert harm(healthy | {50: 2.2, 75: 2.2}, healthy) == 50
    assert harm(healthy | {50: 2.2}, healthy) is None
    assert harm(healthy | {50: math.nan, 75: math.nan}, healthy) == 50


def test_a_rule_is_judged_on_all_sites_of_a_step() -> None:
    rule = Alert("rank", below=1.0, for_samples=1, warm_up_samples=0, quorum=2, cooldown_steps=0)
    sites = {"a": {10: 2.0, 20: 0.5, 30: 0.5}, "b": {10: 2.0, 20: 2.0, 30: 0.5}}

    assert steps(Column("rank", rule, "below"), sites) == [30]


def test_the_first_alarm_is_that_since_the_fault() -> None:
    outcome = Outcome(0, None, None, {"a": [10, 250], "b": [220]}, {})

    assert first(outcome, ["a", "b"], 200) == 220
    assert first(outcome, ["a"], 300) is None


def test_quantities_are_those_of_sites_and_of_the_model_without_summaries_and_costs() -> None:
    moving, constant = {0: 1.0, 10: 2.0}, {0: 1.0, 10: 1.0}
    curves = {
        **{"rank/weight_stable_rank_median": moving, "rank/weight_stable_rank_max": moving},
        **{"weight_stable_rank/net.0": moving, "weight_stable_rank_error/net.0": moving, "noise/scale": moving},
        **{"lowrank/rank_time_ms": moving, "weight_width/net.0": constant, "loss": moving},
    }

    assert by_quantity(curves) == {
        "weight_stable_rank": {"net.0": moving},
        "noise_scale": {"": moving},
        "loss": {"": moving},
    }
