"""Oracles: planted directions of known strength in Gaussian noise; scipy's root finding for the law's median."""

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.marchenko_pastur import edge_over_median
from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import marchenko_pastur_outliers
from tests.oracles.spectra import gaussian, with_values


@pytest.mark.parametrize("planted", [0, 1, 3, 8])
def test_counts_planted_directions(planted):
    noise = gaussian(100, 150) / 150**0.5
    matrix = noise + with_values([4.0] * planted, (100, 150), seed=5)

    assert marchenko_pastur_outliers(svd(matrix)).item() == planted


@pytest.mark.parametrize(
    ("shape", "rate"), [((8, 8), 0.015), ((16, 16), 0.004), ((32, 64), 0.001), ((128, 128), 0.001)]
)
def test_false_alarms_are_rare(shape, rate):
    counts = marchenko_pastur_outliers(svd(gaussian(1000, *shape)))

    assert (counts > 0).double().mean().item() <= rate + 3 * (rate / 1000) ** 0.5


def test_weak_directions_are_missed():
    noise = gaussian(100, 150) / 150**0.5
    matrix = noise + with_values([0.5], (100, 150), seed=5)

    assert marchenko_pastur_outliers(svd(matrix)).item() == 0


def median_eigenvalue(aspect):
    low, high = (1 - aspect**0.5) ** 2, (1 + aspect**0.5) ** 2

    def below(x):
        return scipy.integrate.quad(lambda y: np.sqrt((high - y) * (y - low)) / (2 * np.pi * aspect * y), low, x)[0]

    return scipy.optimize.brentq(lambda x: below(x) - 0.5, low + 1e-9, high)


@pytest.mark.parametrize("aspect", [0.1, 0.5, 1.0])
def test_edge_over_median_tends_to_that_of_the_law(aspect):
    expected = (1 + aspect**0.5) / median_eigenvalue(aspect) ** 0.5

    assert_close(edge_over_median((int(20000 * aspect), 20000), 0.0), expected, rtol=1e-3, atol=0)


def test_an_empty_matrix_has_none():
    assert marchenko_pastur_outliers(svd(torch.zeros(0, 3))).item() == 0
