"""Oracle: the entropy of a cascade's shares, its information dimension."""

import numpy as np
import pytest
from torch.testing import assert_close

from lightning_lowrank.statistics import alpha0
from tests import scalings


@pytest.mark.parametrize("cascade", scalings.CASCADES)
def test_is_the_information_dimension(cascade):
    parts, base, _ = cascade
    shares = np.array(parts) / np.sum(parts)
    expected = -(shares * np.log(shares)).sum() / np.log(base)

    assert_close(alpha0(scalings.cascade(*cascade)).item(), float(expected), rtol=0, atol=1e-10)


def test_is_the_slope_of_the_mean_logarithm():
    scaling = scalings.uneven()[2]
    expected = np.polyfit(scaling.masses.mean(0).log(), scaling.masses.log().mean(0), 1)[0]

    assert_close(alpha0(scaling).item(), float(expected), rtol=0, atol=1e-10)
