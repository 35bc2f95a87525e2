"""Oracle: variances and slopes by numpy."""

import numpy as np
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.statistics import c2_excess
from tests import scalings
from tests.oracles.spectra import gaussian


def test_is_the_slope_of_the_excess_variance():
    scaling = scalings.cascade((1, 2), 3, 6)
    masses = scaling.masses.numpy()
    excess = np.log(masses).var(0, ddof=1) - 1 / masses.mean(0)

    assert_close(
        c2_excess(scaling).item(), float(np.polyfit(np.arange(7) * np.log(3), excess, 1)[0]), rtol=0, atol=1e-10
    )


def test_is_without_bias_on_independent_weights():
    """Within three standard errors of the mean."""
    found = c2_excess(rank_scaling(gaussian(200, 64, 64)))

    assert abs(float(found.mean())) < 3 * float(found.std()) / 200**0.5


def test_is_negative_where_rows_differ():
    assert float(c2_excess(rank_scaling(scalings.jittered(256, 256, spread=0.1)))) < -0.05
