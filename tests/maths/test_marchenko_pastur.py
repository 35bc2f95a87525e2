"""The law of noise, by scipy's quadrature: no code in common."""

import numpy as np
import pytest
from scipy.integrate import quad

from lightning_lowrank.maths.spectra.marchenko_pastur import quantiles


@pytest.mark.parametrize(("short", "long"), [(8, 9), (8, 32), (16, 16), (50, 400)])
def test_as_much_of_the_law_lies_below_each_quantile_as_it_says(short: int, long: int) -> None:
    ratio = short / long
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2

    def density(angle: float) -> float:
        """Of the angle at which `low + (high - low) sin(angle / 2)^2` is the eigenvalue: nowhere singular."""
        eigenvalue = low + (high - low) * np.sin(angle / 2) ** 2
        return float(((high - low) / 2 * np.sin(angle)) ** 2 / (2 * np.pi * ratio * eigenvalue))

    angles = 2 * np.arcsin(np.sqrt((quantiles(short, long).numpy() ** 2 - low) / (high - low)))

    below = [1 - quad(density, 1e-9, angle)[0] for angle in angles]
    np.testing.assert_allclose(below, (np.arange(short) + 0.5) / short, rtol=0, atol=1e-7)
