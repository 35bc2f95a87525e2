"""How far the loss could have followed the last update."""

import math

import pytest
import torch
from torch import Tensor

from lightning_lowrank.monitors.curvature.critical import along_update, critical_multiple


def quadratic(sharpness: float, rate: float) -> object:
    """The loss along a step of gradient descent from 1."""
    return lambda multiple: sharpness / 2 * (1 - multiple * rate * sharpness) ** 2


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.19, 0.5])
def test_on_a_quadratic_it_is_two_over_rate_and_sharpness(rate: float) -> None:
    result = critical_multiple(quadratic(10.0, rate), torch.tensor(1.0), passes=24)
    found, error = result.multiple, result.error

    torch.testing.assert_close(found, torch.tensor(2 / (rate * 10.0)), rtol=1e-3, atol=0)
    assert abs(found - 2 / (rate * 10.0)) <= error + 1e-6


@pytest.mark.parametrize("guess", [0.05, 0.9, 1.0, 1.7, 30.0])
def test_eight_passes_are_enough_to_know_it_within_its_error(guess: float) -> None:
    result = critical_multiple(quadratic(10.0, 0.2), torch.tensor(guess))
    found, error = result.multiple, result.error

    assert abs(found - 1.0) <= error
    assert error < 0.7


def test_a_good_guess_gives_a_small_error() -> None:
    near = critical_multiple(quadratic(10.0, 0.2), torch.tensor(0.9)).error
    far = critical_multiple(quadratic(10.0, 0.2), torch.tensor(300.0)).error

    assert near < far / 4


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_there_is_none_where_the_loss_only_climbs_or_only_falls(slope: float) -> None:
    result = critical_multiple(lambda multiple: slope * multiple, torch.tensor(1.0))
    found, error = result.multiple, result.error

    assert math.isnan(found)
    assert math.isnan(error)


def test_a_loss_that_is_no_number_is_too_far() -> None:
    def breaks(multiple: Tensor) -> Tensor:
        return torch.where(multiple < 3, -multiple, torch.nan)

    result = critical_multiple(breaks, torch.tensor(1.0), passes=20)
    found, error = result.multiple, result.error

    assert abs(found - 3) <= error + 1e-5


def test_a_start_that_is_no_number_gives_none() -> None:
    found = critical_multiple(lambda multiple: multiple * torch.nan, torch.tensor(1.0)).multiple

    assert math.isnan(found)


def test_a_search_that_was_too_short_goes_on_where_it_ended() -> None:
    guess = torch.tensor(1.0)
    for _ in range(4):
        result = critical_multiple(quadratic(1.0, 1e-5), guess)
        guess = result.guess

    assert abs(result.multiple - 2e5) <= result.error


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_a_search_recovers_from_any_time_without_a_crossing(slope: float) -> None:
    """Warm-up at a rate of zero, updates that climb, losses that are no numbers: the guess must not be lost in them."""
    guess = torch.tensor(1.0)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parameters_of_any_precision_are_put_back_and_have_a_multiple_in_float32(dtype: torch.dtype) -> None:
    end, start = torch.tensor([0.5, 0.0], dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype)
    before = end.clone()

    found = along_update([end], [start], lambda: end.float().square().sum(), None)

    torch.testing.assert_close(end, before, rtol=0, atol=0)
    torch.testing.assert_close(found.multiple, torch.tensor(4.0), rtol=1e-2, atol=0)
