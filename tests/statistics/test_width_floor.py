"""Oracle: widths of matrices of independent weights, and numpy's slope of the variance of counts."""

import numpy as np
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.statistics import width, width_floor
from tests import scalings
from tests.oracles.spectra import gaussian, generator


def test_is_near_the_width_of_independent_weights():
    scaling = rank_scaling(gaussian(24, 512, 256))

    assert_close((width(scaling) / width_floor(scaling)).mean().item(), 1.15, rtol=0, atol=0.15)


def test_is_six_slopes_of_the_noise_of_counts():
    scaling = scalings.cascade((1, 2), 3, 6)
    slope = np.polyfit(np.arange(7) * np.log(3), 1 / scaling.masses.numpy().mean(0), 1)[0]

    assert_close(width_floor(scaling).item(), float(6 * abs(slope)), rtol=0, atol=1e-10)


def test_noise_in_rank_mode_is_that_of_binomial_counts():
    scaling = rank_scaling(gaussian(64, 128))
    draws = np.random.default_rng(generator().initial_seed()).binomial(
        128, (scaling.masses.numpy().mean(0) - 1) / 128, (200_000, 24)
    )

    assert_close(scaling.noise_variances.numpy(), np.log1p(draws).var(0), rtol=0.02, atol=0)
