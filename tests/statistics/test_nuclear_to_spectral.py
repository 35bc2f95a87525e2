"""Oracle: numpy's nuclear norm and 2-norm."""

import numpy as np
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import nuclear_to_spectral
from tests.oracles.spectra import gaussian


def test_matches_numpy():
    matrix = gaussian(30, 20)
    expected = np.linalg.norm(matrix, "nuc") / np.linalg.norm(matrix, 2)

    assert_close(nuclear_to_spectral(svd(matrix)).item(), float(expected))
