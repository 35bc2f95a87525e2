"""Oracle: a loop by numpy over the radii."""

import numpy as np
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics import dispersion
from tests import scalings
from tests.oracles.spectra import gaussian


def test_is_the_mean_excess_variance():
    scaling = scalings.cascade((1, 2), 3, 6)
    expected = np.mean([np.log(column).var(ddof=1) - 1 / column.mean() for column in scaling.masses.numpy().T])

    assert_close(dispersion(scaling).item(), float(expected), rtol=0, atol=1e-10)


def test_is_without_bias_on_independent_weights():
    """Within three standard errors of the mean."""
    found = dispersion(rank_scaling(gaussian(200, 64, 64)))

    assert abs(float(found.mean())) < 3 * float(found.std()) / 200**0.5


def test_is_the_variance_of_the_logarithm_of_scales():
    """Nodes whose masses differ by a factor of their own, at all radii, without noise."""
    factors = torch.linspace(-1, 1, 50, dtype=torch.float64)
    masses = (factors[:, None] + torch.arange(6)).exp()
    scaling = Scaling(masses, torch.ones(6).double(), torch.arange(6).double(), noise=torch.zeros(6).double())

    assert_close(dispersion(scaling), factors.var(), rtol=0, atol=1e-10)


def test_is_a_number_where_there_is_no_spectrum():
    assert float(dispersion(rank_scaling(scalings.jittered(256, 256, spread=0.5)))) > 1
