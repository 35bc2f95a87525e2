"""Oracles: the loop of `test_tail_exponent`, and scipy's Kolmogorov-Smirnov statistic."""

import numpy as np
import pytest
import scipy.stats
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import tail_exponent_fit
from tests.oracles.power_law import clauset
from tests.oracles.spectra import gaussian, singular_values


@pytest.mark.parametrize("seed", range(4))
def test_matches_a_loop(seed):
    matrix = gaussian(60, 40, seed=seed)

    assert_close(tail_exponent_fit(svd(matrix)).item(), clauset(singular_values(matrix) ** 2)[0], rtol=1e-8, atol=0)


def test_is_within_a_step_of_the_two_sided_distance():
    """Theirs looks at both ends of each step of the data, Clauset's at the lower end: at most 1 / n apart."""
    eigenvalues = singular_values(gaussian(60, 40)) ** 2
    distance, alpha = clauset(eigenvalues)
    two_sided = [
        scipy.stats.kstest(e, scipy.stats.pareto(alpha - 1, scale=e.min()).cdf)
        for e in (np.sort(eigenvalues)[i:] for i in range(39))
    ]

    assert any(0 <= result.statistic - distance <= 1 / (40 - i) + 1e-9 for i, result in enumerate(two_sided))
