"""Monitors do not see each other: beside any other one, the numbers of each are those that it has alone."""

from functools import cache
from itertools import permutations

import pytest
from torch.testing import assert_close

from lightning_lowrank import JacobianPenalty
from tests.monitors import MONITORS
from tests.trainings import logged

Curves = dict[str, dict[int, float]]


@cache
def alone(name: str) -> Curves:
    """Numbers of a monitor that has the training to itself."""
    return logged([MONITORS[name](every_n_steps=2)])[0].numbers()


@pytest.mark.parametrize(("first", "second"), [*permutations(MONITORS, 2)])
def test_numbers_beside_another_are_those_alone(first: str, second: str) -> None:
    monitors = [MONITORS[name](every_n_steps=2) for name in (first, second)]

    both = logged(monitors)[0].numbers()

    for name, monitor in zip((first, second), monitors, strict=True):
        assert monitor.failures == 0, name
        found = {tag: both.get(tag) for tag in alone(name)}
        assert_close(found, alone(name), rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
    assert both.keys() == alone(first).keys() | alone(second).keys()


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.parametrize("comes", ["before", "after"])
def test_numbers_beside_a_penalty_that_is_only_logged_are_those_alone(comes: str, name: str) -> None:
    monitor, penalty = MONITORS[name](every_n_steps=2), JacobianPenalty(0.01)

    both = logged([penalty, monitor] if comes == "before" else [monitor, penalty])[0].numbers()

    found = {tag: both.get(tag) for tag in alone(name)}
    assert_close(found, alone(name), rtol=0, atol=0, equal_nan=True)
    assert monitor.failures == 0


@pytest.mark.parametrize("name", MONITORS)
def test_numbers_beside_a_penalty_that_is_added_do_not_hang_on_the_order(name: str) -> None:
    found = []
    for comes_first in (True, False):
        both = [JacobianPenalty(0.01, add=True), MONITORS[name](every_n_steps=2)]
        found.append(logged(both if comes_first else both[::-1])[0].numbers())

    assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)
