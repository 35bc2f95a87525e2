"""Oracle: rows that were set to zero, neurons that have few edges."""

import torch
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.multifractal import multifractal_spectrum
from lightning_lowrank.statistics import kept_share
from tests.oracles.spectra import gaussian


def test_is_the_share_of_rows_that_are_not_zero():
    weights = gaussian(40, 64).index_fill(0, torch.arange(10), 0.0)

    assert_close(kept_share(multifractal_spectrum(weights, direction="in")).item(), 0.75)


def test_is_the_share_of_neurons_with_more_than_ten_edges():
    """Twenty neurons with ten edges of length 2, twenty with eleven."""
    weights = torch.zeros(40, 64)
    weights[:20, :10], weights[20:, :11] = 0.5, 0.5

    assert_close(kept_share(multifractal_spectrum(weights, "neuromfa", direction="in")).item(), 0.5)
