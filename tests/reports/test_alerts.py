"""Rules and their states, on numbers written by hand: ok, pending, firing, over."""

import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank import (
    Alert,
    AlertEvent,
    ChangePointAlert,
    CusumAlert,
    RankCollapseAlert,
    RankMonitor,
    SpikeAlert,
)
from lightning_lowrank.reports.alerts.ready_made import default_alerts
from lightning_lowrank.reports.alerts.rulebook import Rulebook
from lightning_lowrank.reports.alerts.states import RuleState
from tests.processes import together

NAN = math.nan
QUICK: dict[str, Any] = {"warm_up_samples": 3, "window": 3, "for_samples": 3, "keep_samples": 2, "cooldown_steps": 0}
QUANTITY = "weight_stable_rank"


CONDITIONS_KNOWN = {"below", "above", "drop", "rise", "slope", "change", "departure", "spike", "cusum", "non_finite"}


def rule(**options: Any) -> Alert:
    """Patient for three samples, after a warm-up of three; below 1.0 unless another condition is given."""
    return Alert(QUANTITY, **(QUICK | ({} if options.keys() & CONDITIONS_KNOWN else {"below": 1.0}) | options))


def at_work(alert: Alert) -> RuleState:
    return RuleState(alert, alert.quantity, "rule")


def shown(
    state: RuleState, curve: Sequence[float], *, errors: Sequence[float] = (), start: int = 0
) -> list[AlertEvent]:
    """Events of a curve of one site, one sample per step."""
    bounds = [*errors, *[0.0] * (len(curve) - len(errors))]
    found = (state.observe(start + i, {"a": value}, {"a": bounds[i]}) for i, value in enumerate(curve))
    return [event for event in found if event is not None]


def told(alert: Alert, curve: Sequence[float], **options: Any) -> list[tuple[int, str]]:
    """Step and state of the events of a curve."""
    return [(event.step, event.state) for event in shown(at_work(alert), curve, **options)]


def test_nothing_fires_in_the_warm_up() -> None:
    assert told(rule(warm_up_samples=8), [0.0] * 8) == []
    assert told(rule(warm_up_steps=50), [0.0] * 50) == []


def test_a_violation_that_lasts_fires_once() -> None:
    assert told(rule(), [2.0] * 3 + [0.5] * 10) == [(5, "firing")]


def test_a_violation_that_is_too_short_never_fires() -> None:
    state = at_work(rule())

    assert shown(state, [2.0] * 3 + [0.5, 0.5, 2.0] * 5) == []


def test_levels_are_ok_pending_and_firing() -> None:
    state, levels = at_work(rule()), []

    for step, value in enumerate([2.0] * 4 + [0.5] * 3 + [2.0] * 2):
        state.observe(step, {"a": value}, {})
        levels.append(state.level)

    assert levels == [0, 0, 0, 0, 1, 1, 2, 2, 0]


def test_it_is_over_only_beyond_the_hysteresis_and_for_as_long_as_asked() -> None:
    fired = [2.0] * 3 + [0.5] * 3

    assert told(rule(), fired + [1.05] * 10) == [(5, "firing")]
    assert told(rule(), fired + [1.2, 1.05] * 5) == [(5, "firing")]
    assert told(rule(), fired + [1.2, 1.2]) == [(5, "firing"), (7, "resolved")]


@pytest.mark.parametrize("gap", [NAN, math.inf, -math.inf])
def test_a_number_that_is_not_finite_counts_neither_way(gap: float) -> None:
    """A gap between two violations, between two recoveries, and in the warm-up."""
    curve = [2.0, gap, 2.0, 2.0] + [0.5, gap, 0.5, gap, 0.5] + [2.0, gap, 2.0]

    assert told(rule(), curve) == [(8, "firing"), (11, "resolved")]


def test_a_site_that_is_not_in_a_sample_counts_neither_way() -> None:
    state = at_work(rule())
    shown(state, [2.0] * 3 + [0.5, 0.5])

    missing = state.observe(5, {"b": 2.0}, {})
    present = state.observe(6, {"a": 0.5}, {})

    assert missing is None
    assert present is not None and present.since == 3


def test_messages_are_as_far_apart_as_the_cooldown_says() -> None:
    flapping = [2.0] * 3 + ([0.5] * 3 + [2.0] * 3) * 6

    steps = [step for step, state in told(rule(cooldown_steps=13), flapping) if state == "firing"]

    assert min(b - a for a, b in pairwise(steps)) >= 13
    assert len(steps) == 3


def test_what_began_in_the_cooldown_is_told_when_it_is_over_if_it_still_fires() -> None:
    curve = [2.0] * 3 + [0.5] * 3 + [2.0] * 2 + [0.5] * 20

    assert told(rule(cooldown_steps=15), curve) == [(5, "firing"), (7, "resolved"), (20, "firing")]


def test_a_quorum_is_a_number_or_a_share_of_sites() -> None:
    for quorum, needed in ((1, 1), (3, 3), (0.5, 2), (1.0, 4)):
        for ill in range(5):
            state = at_work(rule(quorum=quorum))
            events = [
                state.observe(s, {str(i): 0.5 if s > 2 and i < ill else 2.0 for i in range(4)}, {}) for s in range(8)
            ]
            assert any(events) == (ill >= needed), (quorum, ill)


def test_a_sample_gives_one_message_with_the_worst_sites_first() -> None:
    state = at_work(rule())
    ill = {f"layer.{i}": 0.9 - 0.1 * i for i in range(8)}

    events = [state.observe(s, ill if s > 2 else dict.fromkeys(ill, 2.0), {}) for s in range(8)]

    (event,) = [event for event in events if event is not None]
    assert [site.site for site in event.worst] == ["layer.7", "layer.6", "layer.5", "layer.4", "layer.3"]
    assert (event.num_firing, event.num_sites) == (8, 8)
    assert "and 3 more" in event.message


def test_more_sites_are_told_once() -> None:
    state = at_work(rule())
    curves = {"a": [2.0] * 3 + [0.5] * 12, "b": [2.0] * 8 + [0.5] * 7}

    events = [state.observe(s, {site: curve[s] for site, curve in curves.items()}, {}) for s in range(15)]

    assert [(event.step, event.num_firing) for event in events if event is not None] == [(5, 1), (10, 2)]


def test_a_frozen_baseline_cannot_be_dragged_down() -> None:
    state = at_work(rule(drop=0.5, window=3))

    events = shown(state, [10.0] * 5 + [4.0] * 30)

    assert [event.state for event in events] == ["firing"]
    assert state.tracks["a"].baseline == 10.0


def test_a_pending_violation_that_passes_leaves_no_trace_in_the_baseline() -> None:
    state = at_work(rule(drop=0.5))

    shown(state, [10.0] * 5 + [4.0, 4.0, 10.0])

    assert state.tracks["a"].history == [10.0, 10.0, 10.0]


def test_a_running_baseline_follows_a_slow_fall_and_that_of_the_warm_up_does_not() -> None:
    slow = [10.0 * 0.98**i for i in range(60)]

    assert told(rule(drop=0.5), slow) == []
    assert [state for _, state in told(rule(drop=0.5, baseline="warm-up"), slow)] == ["firing"]


CONDITIONS: dict[str, tuple[dict[str, Any], list[float], list[float]]] = {
    "below": ({"below": 1.0}, [2.0] * 5, [0.5] * 3),
    "above": ({"above": 3.0}, [2.0] * 5, [4.0] * 3),
    "drop": ({"drop": 0.5}, [2.0] * 5, [0.9] * 3),
    "rise": ({"rise": 1.0}, [2.0] * 5, [4.1] * 3),
    "slope": ({"slope": 0.1}, [2.0] * 5, [1.7, 1.4, 1.1, 0.8]),
    "change up": ({"change": 6.0}, [2.0, 2.02, 1.98, 2.0, 2.01], [2.5] * 3),
    "change down": ({"change": 6.0}, [2.0, 2.02, 1.98, 2.0, 2.01], [1.5] * 3),
    "departure up": ({"departure": 6.0}, [2.0, 2.02, 1.98, 2.0, 2.01], [2.5] * 3),
    "departure down": ({"departure": 6.0, "baseline": "healthy"}, [2.0, 2.02, 1.98, 2.0, 2.01], [1.5] * 3),
    "spike": ({"spike": 6.0}, [2.0, 2.02, 1.98, 2.0, 2.01], [2.2] * 3),
    "cusum": ({"cusum": 4.0}, [2.0, 2.02, 1.98, 2.0, 2.01], [2.15] * 4),
}
LEARNT = {"change", "departure", "spike", "cusum"}


@pytest.mark.parametrize("case", CONDITIONS)
def test_each_condition_fires_on_what_it_is_for_and_on_nothing_in_health(case: str) -> None:
    options, well, ill = CONDITIONS[case]
    alert = rule(**options, **({"warm_up_samples": 10, "window": 10} if LEARNT & options.keys() else {}))

    assert told(alert, well * 5) == []
    assert [state for _, state in told(alert, well * 2 + ill)] == ["firing"]


def test_a_healthy_baseline_is_the_median_and_spread_of_all_that_violated_nothing() -> None:
    """Numpy's percentiles of the whole curve, of which every fourth number is kept."""
    curve = np.random.default_rng(0).normal(10.0, 1.0, 70)
    state = at_work(rule(departure=50.0, baseline="healthy", window=20, warm_up_samples=10))

    shown(state, [*curve, 1e3, 1e3, 1e3])

    track, kept = state.tracks["a"], curve[::4]
    assert track.history == kept[: len(track.history)].tolist() and len(track.history) >= 15
    assert_close(track.baseline, float(np.median(track.history)))
    assert_close(track.spread, 1.4826 * float(np.median(np.abs(np.array(track.history) - track.baseline))))
    assert track.state == "firing"


def test_a_steady_drift_is_no_departure_from_a_healthy_baseline_and_is_one_from_a_running_one() -> None:
    drift = [10.0 + 0.5 * i for i in range(300)]
    options = {"departure": 4.0, "warm_up_samples": 20}

    assert told(rule(**options, baseline="healthy", window=100), drift) == []
    assert [state for _, state in told(rule(**options, baseline="warm-up", window=20), drift)] == ["firing"]


def test_a_departure_is_over_when_the_number_is_back() -> None:
    curve = [2.0, 2.1, 1.9, 2.0, 2.05] * 4
    alert = rule(departure=8.0, baseline="healthy", warm_up_samples=20, window=20)

    assert told(alert, curve + [4.0] * 30 + curve) == [(22, "firing"), (51, "resolved")]


def test_steps_of_the_warm_up_are_no_part_of_a_healthy_baseline() -> None:
    alert = rule(departure=8.0, baseline="healthy", warm_up_samples=20, window=20, warm_up_steps=10)
    state = at_work(alert)

    shown(state, [100.0] * 10 + [2.0, 2.1, 1.9, 2.0, 2.05] * 4)

    assert state.tracks["a"].baseline == 2.0
    assert len(state.tracks["a"].history) == 20


def test_false_alarms_of_departures_on_noise_are_as_few_as_a_gaussian_says() -> None:
    """Of 4,000 independent numbers beyond 3 spreads: 2.7 in a thousand, and more for a spread that is estimated."""
    noise = np.random.default_rng(0).normal(10.0, 1.0, 4100).tolist()
    alert = rule(departure=3.0, baseline="healthy", warm_up_samples=100, window=100, for_samples=1, keep_samples=1)

    told_ = [state for _, state in told(alert, noise)]

    assert 0.5 <= told_.count("firing") / 4 <= 8.0


def test_a_spike_is_so_many_deviations_above_the_mean_of_the_window() -> None:
    """Oracle: numpy's mean and standard deviation."""
    window = np.random.default_rng(0).normal(10.0, 1.0, 128)
    limit = float(window.mean() + 6.0 * window.std())

    for value, fires in ((limit - 1e-3, False), (limit + 1e-3, True)):
        assert bool(told(SpikeAlert(QUANTITY), [*window, value])) == fires


def test_a_cusum_adds_up_what_is_above_the_baseline() -> None:
    """Oracle: Page's recursion, written out."""
    curve = np.random.default_rng(1).normal(10.0, 1.0, 128)
    more = np.random.default_rng(2).normal(11.5, 1.0, 40)
    baseline = float(np.median(curve))
    spread = 1.4826 * float(np.median(np.abs(curve - baseline)))
    sums = [0.0]
    for value in more:
        sums.append(max(0.0, sums[-1] + (float(value) - baseline) / spread - 0.5))
    first = next(i for i, total in enumerate(sums) if total > 8.0) - 1

    events = told(CusumAlert(QUANTITY, baseline="warm-up"), [*curve, *more])

    assert events[0] == (128 + first, "firing")


def test_a_cusum_says_nothing_of_what_falls() -> None:
    noise = np.random.default_rng(0).normal(0.0, 1.0, 200)

    assert told(CusumAlert(QUANTITY), [100.0 + value - 0.3 * i for i, value in enumerate(noise)]) == []


def test_one_of_several_conditions_is_enough() -> None:
    assert told(rule(below=1.0, drop=0.5), [10.0] * 3 + [4.0] * 3) == [(5, "firing")]
    assert told(rule(below=1.0, drop=0.5), [1.1] * 3 + [0.9] * 3) == [(5, "firing")]


def test_of_an_estimate_the_bound_is_compared() -> None:
    curve = [2.0] * 3 + [0.8] * 5

    assert told(rule(), curve, errors=[0.3] * 8) == []
    assert told(rule(), curve, errors=[0.1] * 8) == [(5, "firing")]
    assert told(rule(), [*curve, 1.3, 1.3], errors=[0.1] * 8 + [0.3] * 2) == [(5, "firing")]


def test_the_slope_of_an_estimate_has_a_bound_too() -> None:
    falling = [2.0] * 3 + [1.7, 1.4, 1.1, 0.8]

    assert told(rule(slope=0.1), falling, errors=[1.0] * 7) == []


def test_an_error_that_is_not_known_makes_a_number_missing() -> None:
    assert told(rule(), [2.0] * 3 + [0.5] * 5, errors=[NAN] * 8) == []


def test_the_share_without_a_number_is_judged_over_sites() -> None:
    state = at_work(rule(non_finite=0.5))

    events = [
        state.observe(s, {"a": 1.0, "b": NAN if s > 2 else 1.0, "c": NAN if s > 5 else 1.0}, {}) for s in range(10)
    ]

    (event,) = [event for event in events if event is not None]
    assert (event.step, event.since) == (8, 6)
    assert "NaN" in event.message


def test_a_change_point_is_told_once_and_then_the_new_level_is_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(120, generator=generator)).tolist()
    levels = [2.0] * 40 + [6.0] * 40 + [2.0] * 40

    events = shown(at_work(ChangePointAlert(QUANTITY)), [a + b for a, b in zip(levels, noise, strict=True)])

    assert [(event.step, event.state) for event in events] == [
        (42, "firing"),
        (62, "resolved"),
        (82, "firing"),
        (102, "resolved"),
    ]


def test_a_slow_transition_is_a_change_point_once() -> None:
    slow = [10.0] * 40 + [10.0 - 0.1 * i for i in range(20)] + [8.0] * 60

    assert [state for _, state in told(ChangePointAlert(QUANTITY), slow)] == ["firing", "resolved"]


def test_a_level_that_follows_sees_jumps_and_neither_slow_transitions_nor_trends() -> None:
    alert = ChangePointAlert(QUANTITY, baseline="running")

    assert told(alert, [1.0 + 0.2 * i for i in range(200)]) == []
    assert told(alert, [10.0 - 0.01 * i for i in range(200)]) == []
    assert [state for _, state in told(alert, [10.0] * 40 + [8.0] * 40)] == ["firing", "resolved"]


def test_a_message_says_what_where_how_much_against_what_since_when_why_and_where_it_is_explained() -> None:
    (event,) = shown(at_work(rule(drop=0.5)), [10.0] * 4 + [2.0] * 3)

    what_where_how_much = (QUANTITY, "a 2", "-80 %", "baseline 10", "below 5")
    for part in (
        *what_where_how_much,
        "since step 4",
        "Usual cause: a learning rate",
        "/how-to/get-alerts/#when-one-fires",
    ):
        assert part in event.message, part
    assert len(event.title) <= 63


def test_what_is_over_names_the_sites_and_the_steps_of_its_beginning_and_of_its_report() -> None:
    firing, resolved = shown(at_work(rule()), [2.0] * 3 + [0.5] * 4 + [2.0] * 3)

    assert (firing.since, firing.step, resolved.since, resolved.step) == (3, 5, 3, 8)
    for part in (f"{QUANTITY} of a has recovered at step 8", "since step 3", "reported at step 5"):
        assert part in resolved.message, part
    assert [site.site for site in resolved.worst] == ["a"] and resolved.num_firing == 0


def test_of_the_whole_model_no_site_is_named_when_it_begins_and_when_it_is_over() -> None:
    state = at_work(rule())

    events = [state.observe(step, {"": 2.0 if step < 3 or step > 6 else 0.5}, {}) for step in range(10)]

    firing, resolved = [event for event in events if event is not None]
    assert f"{QUANTITY} at the whole model since step 3: 0.5, " in firing.message
    assert f"{QUANTITY} has recovered at step 8" in resolved.message


NEVER_HEALTHY = {
    "gradient_stable_rank": 0.0,
    "dormant_inactive": 1.0,
    "gradient_effective_rank": NAN,
}


@pytest.mark.parametrize("quantity", NEVER_HEALTHY)
def test_what_is_never_healthy_is_told_at_the_third_sample_from_the_first_on(quantity: str) -> None:
    book = Rulebook("default", [quantity], usual=default_alerts, prefix=None, label="rank")

    for step in (0, 50, 100):
        book.observe(step, {quantity: {"a": NEVER_HEALTHY[quantity]}})

    assert [(event.state, event.step, event.since) for event in book.events] == [("firing", 100, 0)]


def test_a_run_within_the_warm_up_of_all_rules_says_so_and_how_much_was_missing() -> None:
    def after(num_samples: int, *rules: Alert) -> str:
        book = Rulebook(rules, [QUANTITY], usual=default_alerts, prefix=None, label="rank")
        for step in range(num_samples):
            book.observe(step, {QUANTITY: {"a": 2.0}})
        return book.too_short()

    slow, quick = Alert(QUANTITY, drop=0.5, warm_up_steps=500), Alert(QUANTITY, below=1.0, warm_up_samples=4)

    assert after(5, slow, quick).endswith(f"{QUANTITY}_below needs 7 samples, and had 5")
    assert after(5, slow).endswith(f"{QUANTITY}_drop needs 13 samples and step 500, and had 5")
    assert after(7, slow, quick) == after(0, slow) == after(5) == ""


LONG: dict[str, Any] = {"warm_up_samples": 10, "window": 10, "for_samples": 1, "keep_samples": 1}
STORY = [2.0] * 4 + [0.5, NAN, 0.5, 0.5, 0.5, NAN, 1.05, 2.0, 2.0, 2.0, 0.5, 0.5, 2.0, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("stopped", range(len(STORY)))
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"drop": 0.5}, {"cooldown_steps": 14}, {"change": 5.0, "warm_up_samples": 5, "window": 5}),
        *({"departure": 0.4, "baseline": "healthy", "warm_up_samples": 10, "window": 10}, {"cusum": 2.0, **LONG}),
        {"spike": 0.5, **LONG},
    ],
)
def test_a_run_resumed_in_any_state_gives_the_events_of_one_that_never_stopped(
    options: dict[str, Any], stopped: int
) -> None:
    def watch() -> Rulebook:
        return Rulebook([rule(**options, name="one")], [QUANTITY], usual=default_alerts, prefix=None, label="rank")

    def show(watched: Rulebook, steps: range) -> Rulebook:
        for step in steps:
            watched.observe(step, {QUANTITY: {"a": STORY[step], "b": 5.0}})
        return watched

    whole = show(watch(), range(len(STORY)))
    saved = json.loads(json.dumps(show(watch(), range(stopped)).state_dict()))
    resumed = watch()
    resumed.load_state_dict(saved)

    # As words: NaN is no number's equal.
    assert repr(show(resumed, range(stopped, len(STORY))).events) == repr(whole.events)
    assert len(whole.events) >= 1
    assert resumed.levels() == whole.levels()


def test_a_rule_that_was_changed_begins_anew_in_a_run_that_is_resumed() -> None:
    old, new = at_work(rule()), at_work(rule(below=0.9))
    shown(old, [2.0] * 3 + [0.5] * 3)

    new.load_state_dict(old.state_dict())

    assert new.tracks == {}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"below": None}, "at least one of"),
    ({"below": NAN}, "finite"),
    ({"drop": 1.5}, "drop=1.5 must be a share"),
    ({"slope": 0.0}, "slope=0.0 must be a share"),
    ({"rise": -1.0}, "rise=-1.0 must be above 0"),
    ({"non_finite": 2.0}, "non_finite=2.0"),
    ({"window": 1}, "window=1"),
    ({"for_samples": 0}, "for_samples=0"),
    ({"keep_samples": 0}, "keep_samples=0"),
    ({"cooldown_steps": -1}, "cooldown_steps=-1"),
    ({"warm_up_samples": -1}, "warm_up_samples=-1"),
    ({"drop": 0.5, "warm_up_samples": 0}, "1 samples or more are needed to learn from"),
    ({"change": 5.0}, "5 samples or more are needed to learn from"),
    ({"departure": 5.0, "baseline": "healthy"}, "10 samples or more are needed to learn from"),
    ({"departure": 0.0}, "departure=0.0 must be above 0"),
    ({"spike": -6.0}, "spike=-6.0 must be above 0"),
    ({"cusum": NAN}, "cusum=nan must be a finite number"),
    ({"hysteresis": 1.0}, "hysteresis=1.0"),
    ({"quorum": 0}, "quorum=0"),
    ({"quorum": 1.5}, "quorum=1.5"),
    ({"call_timeout": 0.0}, "call_timeout=0.0"),
    ({"name": "a b"}, "name='a b'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_numbers_that_make_no_sense_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**options)


def test_a_rule_on_what_is_not_measured_is_refused_with_what_is() -> None:
    with pytest.raises(ValueError, match=r"'weight_rank'.*nearest: \['weight_stable_rank'"):
        Rulebook(
            [Alert("weight_rank", below=1.0)],
            [QUANTITY, "gradient_energy_rank"],
            usual=default_alerts,
            prefix=None,
            label="rank",
        )


def test_a_rule_whose_sites_fit_nothing_is_refused_with_what_there_is() -> None:
    watch = Rulebook([rule(sites=["blocks.*", "head"])], [QUANTITY], usual=default_alerts, prefix=None, label="rank")

    with pytest.raises(ValueError, match=r"matches nothing; weight_stable_rank has \['net.0.weight'\]"):
        watch.check({QUANTITY: ["net.0.weight"]})


def test_two_rules_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="must have different names"):
        Rulebook([rule(), rule(below=0.5)], [QUANTITY], usual=default_alerts, prefix=None, label="rank")


def test_the_prefix_of_a_monitor_may_be_left_out() -> None:
    watch = Rulebook([rule()], [f"encoder_{QUANTITY}"], usual=default_alerts, prefix="encoder", label="encoder_rank")

    assert [state.quantity for state in watch.states] == [f"encoder_{QUANTITY}"]


def test_a_collapse_is_judged_by_what_is_normal_for_its_source() -> None:
    weight, gradient = RankCollapseAlert("weight"), RankCollapseAlert("gradient")

    assert weight.drop is not None and gradient.drop is not None and weight.drop < gradient.drop
    assert RankCollapseAlert("weight", floor=2.0).drop is None


def test_defaults_are_silent_in_the_first_steps_whatever_the_cadence() -> None:
    for every in (1, 5, 50):
        for alert in default_alerts([QUANTITY, "weight_effective_rank", "feature_participation_ratio"]):
            state = at_work(alert)
            events = [
                state.observe(step, {"a": 100.0 / (1 + sample)}, {}) for sample, step in enumerate(range(0, 500, every))
            ]
            assert not any(events), (alert.quantity, every)


def test_defaults_allow_what_is_normal_for_each_source() -> None:
    known = [QUANTITY, "weight_effective_rank", "gradient_stable_rank", "update_stable_rank"]

    rules = {alert.quantity: alert for alert in default_alerts(known) if alert.of_sites}

    assert rules["gradient_stable_rank"].conditions == ["below"]
    assert rules[QUANTITY].drop == 0.35
    assert rules["weight_effective_rank"].drop == 0.06
    assert "update_stable_rank" not in rules


def test_defaults_are_on_what_is_measured() -> None:
    rules = default_alerts(["weight_stable_rank", "update_effective_rank"])

    assert [alert.quantity for alert in rules] == ["weight_stable_rank"]
    assert all(
        set(alert.actions) <= {"warn", "log", "wandb"}
        for alert in default_alerts(["weight_stable_rank", "gradient_stable_rank"])
    )


@pytest.mark.parametrize("quorum", [2, 20])
def test_a_quorum_that_is_never_met_is_refused_before_training(quorum: int) -> None:
    watch = Rulebook(
        [Alert("weight_stable_rank", sites="net.0*", below=1.0, quorum=quorum)],
        ["weight_stable_rank"],
        usual=default_alerts,
        prefix=None,
        label="rank",
    )

    with pytest.raises(ValueError, match=f"quorum={quorum} can never be met: it watches 1 site"):
        watch.check({"weight_stable_rank": ["net.0.weight", "net.2.weight"]})


WRONG_TYPES = {
    "Alert('weight_stable_rank', below=1.0)": r"alerts.*a sequence of \[Alert\]",
    "[{'quantity': 'weight_stable_rank', 'drop': 0.5}]": r"alerts.*a sequence of \[Alert\]",
    "[Alert('weight_stable_rank', below=1.0, call='my.function')]": "alert.*call='my.function' must be a function",
}


def refusals(rank: int, size: int, root: Path) -> list[str]:
    """What is said of each of the wrong types."""
    found = []
    for rules in WRONG_TYPES:
        with pytest.raises(ValueError, match=r"") as refused:
            RankMonitor(alerts=eval(rules), detail="all")
        found.append(str(refused.value))
    return found


@pytest.mark.slow
def test_rules_of_the_wrong_type_are_refused_in_words(tmp_path: Path) -> None:
    """In a process without the type checks of the tests, which would be first."""
    (found,) = together(refusals, tmp_path, size=1)

    for said, message in zip(found, WRONG_TYPES.values(), strict=True):
        assert re.search(message, said, re.DOTALL)
