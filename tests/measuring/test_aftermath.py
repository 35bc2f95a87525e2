"""Oracle: steps whose times are known."""

import pytest

from lightning_lowrank.measuring.aftermath import Aftermath

STEP, EVERY, SAMPLES = 1.0, 20, 6


def told(
    extra: dict[int, float], ours: float = 5.0, slow: frozenset[int] = frozenset(), *, wanders: bool = False
) -> float:
    """What it says of a training in which steps take longer by `extra`, by their place after a sample.

    Args:
        ours: Our own time in the step of each sample.
        slow: Steps with something else in them.
        wanders: A place later after each sample.
    """
    aftermath, now, spent = Aftermath(), 0.0, 0.0
    for step in range(SAMPLES * EVERY + 1):
        sampled, before = step % EVERY == 1, step - 1
        aftermath.step_begins(now, spent, measures=before not in slow, sampled=sampled)
        spent += ours * (step % EVERY == 0)
        place = step % EVERY - wanders * (step // EVERY)
        now += STEP + extra.get(place, 0.0) + ours * (step % EVERY == 0) + 100.0 * (step in slow)
    return aftermath.seconds


def test_steps_after_a_sample_are_held_against_those_far_from_one() -> None:
    extra = {0: 0.5, 1: 0.25, 2: 0.125}

    assert told(extra) == pytest.approx(SAMPLES * sum(extra.values()))


def test_what_is_ours_is_not_counted_twice() -> None:
    assert told({}) == 0.0


def test_a_step_that_has_something_else_in_it_is_no_measure() -> None:
    extra = {0: 0.5}

    assert told(extra, slow=frozenset({2 * EVERY, 3 * EVERY + 12})) == pytest.approx(SAMPLES * 0.5)


def test_a_delay_that_strikes_another_step_after_each_sample_is_counted() -> None:
    assert told({1: 0.5}, wanders=True) == pytest.approx(SAMPLES * 0.5)
