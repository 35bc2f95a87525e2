"""Oracle: the root of the sum of squared entries."""

from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import frobenius_norm
from tests.oracles.spectra import gaussian


def test_matches_entries():
    matrix = gaussian(30, 20)

    assert_close(frobenius_norm(svd(matrix)), matrix.square().sum().sqrt())
