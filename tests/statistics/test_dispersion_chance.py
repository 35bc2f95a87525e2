"""Oracle: scipy's chi-squared law, and draws of independent weights."""

import numpy as np
from scipy.stats import chi2, norm
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.statistics import dispersion, dispersion_chance
from tests.oracles.spectra import gaussian


def test_is_a_quantile_of_the_chi_squared_law():
    scaling = rank_scaling(gaussian(64, 128))
    noise = scaling.noise_variances.numpy()
    variance = 2 * np.mean([[min(one, other) ** 2 for one in noise] for other in noise]) / 63
    degrees = 2 * noise.mean() ** 2 / variance
    expected = noise.mean() * (chi2.isf(norm.sf(3.5), degrees) / degrees - 1)

    assert_close(dispersion_chance(scaling).item(), float(expected), rtol=0.01, atol=0)


def test_is_rarely_passed_by_independent_weights():
    scaling = rank_scaling(gaussian(400, 48, 96))

    assert int((dispersion(scaling) > dispersion_chance(scaling)).sum()) <= 4
