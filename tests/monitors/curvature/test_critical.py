"""How far the loss could have followed the last update."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from lightning_lowrank.monitors.curvature.critical import COLD, WARM, along_update, critical_multiple

Loss = Callable[[float], float]
GUESSES = (0.003, 0.1, 0.7, 1.0, 1.6, 5.0, 40.0, 900.0)


def quadratic(sharpness: float, rate: float) -> Loss:
    """The loss along a step of gradient descent from 1."""
    return lambda multiple: sharpness / 2 * (1 - multiple * rate * sharpness) ** 2


class Counted:
    """A loss, and the multiples at which it was asked for."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.at = loss, list[float]()

    def __call__(self, multiple: float) -> float:
        self.at.append(multiple)
        return self.loss(multiple)


def bisected(loss: Loss, guess: float, passes: int = 7) -> float:
    """The error that leaps by four and a bisection of logarithms leave after as many passes."""
    below, above, at = 0.0, math.inf, guess
    for _ in range(passes):
        below, above = (at, above) if loss(at) <= loss(0.0) else (below, at)
        at = above / 4 if below == 0 else below * 4 if math.isinf(above) else math.sqrt(below * above)
    return math.sqrt(above / below) - 1 if below > 0 and above < math.inf else math.inf


def crossings(loss: Loss) -> list[float]:
    """All multiples beyond which the loss is higher than at 0, by scipy's root finder from a fine grid."""

    def excess(multiple: float) -> float:
        difference = loss(multiple) - loss(0.0)
        return 1e30 if math.isnan(difference) else min(max(difference, -1e30), 1e30)

    grid = np.geomspace(1e-4, 1e4, 40_001)
    values = np.array([excess(multiple) for multiple in grid])
    rises = np.nonzero((values[:-1] <= 0) & (values[1:] > 0))[0]
    # What is flat at the height of the start is not higher.
    return [float(brentq(lambda m: excess(m) or -1e-30, grid[i], grid[i + 1], xtol=1e-12)) for i in rises]


# Losses that fall at first, most of them smoothly, and cross the height of the start near 1.
SMOOTH: dict[str, Loss] = {
    "quadratic": lambda m: (m - 0.5) ** 2,
    "cubic": lambda m: -m + 0.6 * m**2 + 0.4 * m**3,
    "flattening": lambda m: 1 - m * math.exp(-m) + 0.3 * m**2,
    "cosh": lambda m: math.cosh(3 * min(m - 0.5, 200)),
    "with an offset": lambda m: 1e6 + (m - 0.5) ** 2,
}
HOSTILE: dict[str, Loss] = {
    "far from a quadratic": lambda m: m**8 - m,
    "no number beyond": lambda m: -m if m < 1.1 else math.nan,
    "infinite beyond": lambda m: -m if m < 0.9 else math.inf,
    "minus infinity before": lambda m: 1.0 if m == 0 else -math.inf if m < 0.9 else 2.0,
    "a step": lambda m: 0.0 if m == 0 else -1.0 if m < 1.07 else 1e-9,
    "a step to the sky": lambda m: 0.0 if m == 0 else -1e-9 if m < 1.07 else 1e300,
    "an abyss before a hair": lambda m: 0.0 if m == 0 else -1e300 if m < 0.93 else 1e-300,
    "a plateau at the height of the start": lambda m: -m * (0.7 - m) if m < 0.7 else max(0.0, m - 1.2),
    "a plateau below": lambda m: max(-m, -0.1) if m < 1.3 else 1.0,
    "a kink": lambda m: -m if m < 0.9 else 30 * (m - 0.93),
    "a kink that flattens": lambda m: -30 * min(m, 0.03) + max(m - 0.03, 0),
    "stairs": lambda m: math.floor(20 * ((m - 0.5) ** 2 - 0.25)) / 20 if m else 0.0,
    "a wiggle": lambda m: m * (m - 1) + 0.2 * math.sin(40 * m) * m,
    "three crossings": lambda m: m * (m - 0.53) * (m - 2.1) * (m - 8.3) / (1 + m) ** 3,
    "a hole after the crossing": lambda m: m * (m - 1) if not 1.5 < m < 1.6 else -1.0,
}


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.19, 0.5])
def test_on_a_quadratic_it_is_two_over_rate_and_sharpness(rate: float) -> None:
    found = critical_multiple(quadratic(10.0, rate), 1.0)

    assert abs(found.multiple - 2 / (rate * 10.0)) <= found.error
    assert found.error < 0.022 * found.multiple


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("name", SMOOTH | HOSTILE)
def test_it_is_within_its_error_of_a_crossing(name: str, guess: float) -> None:
    loss = (SMOOTH | HOSTILE)[name]
    found = critical_multiple(loss, guess, COLD)

    assert min(abs(crossing - found.multiple) for crossing in crossings(loss)) <= found.error * (1 + 1e-9)
    assert found.error < 0.0225 * found.multiple


@pytest.mark.parametrize("guess", [0.05, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("name", ["three crossings", "a hole after the crossing"])
def test_it_is_the_first_crossing_where_the_guess_is_not_beyond_another(name: str, guess: float) -> None:
    loss = HOSTILE[name]
    found = critical_multiple(loss, min(guess, 1.2), COLD)

    assert abs(found.multiple - crossings(loss)[0]) <= found.error


@pytest.mark.parametrize("guess", [0.26, 0.5, 1.0, 2.0, 3.9])
@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_loss_takes_few_passes_where_the_guess_is_within_a_factor_of_four(name: str, guess: float) -> None:
    """One at 0, two that enclose the crossing, and two more for a quadratic; a bisection takes eight."""
    counted = Counted(SMOOTH[name])
    critical_multiple(counted, guess)

    assert len(counted.at) <= (5 if name == "quadratic" else 7)


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("name", SMOOTH | HOSTILE)
def test_it_is_known_as_well_as_by_bisection_with_three_passes_more_at_worst(name: str, guess: float) -> None:
    counted = Counted((SMOOTH | HOSTILE)[name])
    found = critical_multiple(counted, guess)
    expected = bisected(counted.loss, guess)

    assert len(counted.at) <= 1 + WARM + 1
    assert math.isinf(expected) or found.error / found.multiple <= max(expected, 0.0225) * (1 + 1e-6)


def test_no_multiple_is_tried_twice() -> None:
    for loss in (SMOOTH | HOSTILE).values():
        counted = Counted(loss)
        critical_multiple(counted, 1.0, COLD)

        assert len(counted.at) == len(set(counted.at))


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_there_is_none_where_the_loss_only_climbs_or_only_falls(slope: float) -> None:
    found = critical_multiple(lambda multiple: slope * multiple, 1.0)

    assert math.isnan(found.multiple)
    assert math.isnan(found.error)


def test_a_start_that_is_no_number_gives_none_in_one_pass_and_keeps_the_guess() -> None:
    counted = Counted(lambda multiple: multiple * math.nan)
    found = critical_multiple(counted, 3.0)

    assert math.isnan(found.multiple)
    assert (found.guess, len(counted.at)) == (3.0, 1)


def test_a_search_that_was_too_short_goes_on_where_it_ended() -> None:
    guess = 1.0
    for _ in range(4):
        result = critical_multiple(quadratic(1.0, 1e-5), guess)
        guess = result.guess

    assert abs(result.multiple - 2e5) <= result.error


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_a_search_recovers_from_any_time_without_a_crossing(slope: float) -> None:
    """Warm-up at a rate of zero, updates that climb, losses that are no numbers: the guess must not be lost in them."""
    guess = 1.0
    for _ in range(60):
        guess = critical_multiple(lambda multiple: slope * multiple, guess).guess
    for _ in range(4):
        result = critical_multiple(quadratic(10.0, 0.2), guess)
        guess = result.guess

    assert abs(result.multiple - 1.0) <= result.error


def test_rounding_is_no_crossing_of_a_loss_that_climbs() -> None:
    """In float32 a loss that climbs is the same as before within a rounding unit: as far as that it has not climbed."""
    end, start = torch.tensor([1.0]), torch.tensor([0.0])

    found = along_update([end], [start], lambda: (3 + 0.01 * end).sum(), None)

    assert math.isnan(found.multiple)
    assert found.guess == 1.0


def test_a_dip_that_only_half_way_shows_is_seen() -> None:
    """Every pass of the search may happen to be where the loss is as high as before, within rounding."""
    loss = Counted(lambda m: -1.0 if 0.4 < m < 0.6 else 0.0 if m <= 1 else 1.0)
    found = critical_multiple(loss, 1.0, rounding=1e-6)

    assert abs(found.multiple - 1) <= found.error
    assert 0.4 < loss.at[-1] < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parameters_of_any_precision_are_put_back_and_have_a_multiple_in_float32(dtype: torch.dtype) -> None:
    end, start = torch.tensor([0.5, 0.0], dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype)
    before = end.clone()

    found = along_update([end], [start], lambda: end.float().square().sum(), None)

    torch.testing.assert_close(end, before, rtol=0, atol=0)
    assert found.multiple == pytest.approx(4.0, rel=0.022)
