"""Exponents of eigenvalues. Oracle: numpy's weighted least squares."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.power_law import power_law_exponent

RNG = np.random.default_rng(0)


def test_a_power_law_has_its_exponent_and_fits() -> None:
    ranks = torch.arange(1, 65, dtype=torch.float64)

    exponents, quality = power_law_exponent(torch.stack([ranks**-0.5, 7 * ranks**-1, ranks**-3]))

    assert_close(exponents, torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))
    assert_close(quality, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("size", [10, 33, 200])
def test_exponent_and_quality_are_those_of_weighted_least_squares(size: int) -> None:
    values = np.sort(RNG.lognormal(size=size))[::-1]
    begin, end = max(1, round(size / 20)), size // 2
    x, y = np.log(np.arange(begin, end + 1)), np.log(values[begin - 1 : end])
    slope, offset = np.polyfit(x, y, 1, w=np.exp(-x / 2))
    left = np.exp(-x) * (y - slope * x - offset) ** 2
    spread = np.exp(-x) * (y - np.average(y, weights=np.exp(-x))) ** 2

    exponent, quality = power_law_exponent(torch.from_numpy(values.copy()))

    assert exponent.item() == pytest.approx(-slope)
    assert quality.item() == pytest.approx(1 - left.sum() / spread.sum())


def test_what_cannot_be_fitted_is_blank_and_a_flat_spectrum_has_exponent_0() -> None:
    few, flat = torch.ones(9), torch.ones(40)
    low_rank = torch.where(torch.arange(40) < 5, 1.0, 1e-20)

    assert power_law_exponent(few)[0].isnan() and power_law_exponent(low_rank)[0].isnan()
    assert power_law_exponent(flat * torch.nan)[0].isnan()
    assert power_law_exponent(torch.zeros(40))[1].isnan()
    assert power_law_exponent(flat) == (0, 0)
