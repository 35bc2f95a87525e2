"""Oracle: how fast the share of near pairs falls with the distance, in a cascade and by counting pairs."""

import numpy as np
import pytest
from torch.testing import assert_close

from lightning_lowrank.statistics import correlation_dimension
from tests import scalings
from tests.oracles.networks import hops, watts_strogatz


@pytest.mark.parametrize("cascade", scalings.CASCADES)
def test_of_a_cascade(cascade):
    parts, base, _ = cascade
    shares = np.array(parts) / np.sum(parts)
    expected = -np.log((shares**2).sum()) / np.log(base)

    assert_close(correlation_dimension(scalings.cascade(*cascade)).item(), float(expected), rtol=0, atol=1e-10)


def test_is_the_slope_of_the_number_of_near_pairs():
    edges = watts_strogatz(300, 4, 1.0)
    distances = hops(300, edges)
    radii = np.arange(1, distances.max() + 1)
    expected = np.polyfit(np.log(radii), np.log([(distances <= r).sum() for r in radii]), 1)[0]

    assert_close(correlation_dimension(scalings.hops(300, edges)).item(), float(expected), rtol=0, atol=1e-10)
