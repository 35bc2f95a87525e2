"""Oracle: the radii that were asked for."""

import math

from torch.testing import assert_close

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.statistics import decades
from tests import scalings
from tests.oracles.spectra import gaussian


def test_is_the_range_of_the_radii():
    assert_close(decades(scalings.cascade((1, 2), 3, 6)).item(), 6 * math.log10(3), rtol=0, atol=1e-12)


def test_in_rank_mode_is_the_range_of_mean_masses():
    """From one and eight entries to one and half of them."""
    assert_close(decades(rank_scaling(gaussian(256, 512))).item(), math.log10(257 / 9), rtol=0, atol=1e-4)
