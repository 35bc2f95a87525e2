"""Oracle: numpy's 2-norm."""

import numpy as np
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import spectral_norm
from tests.oracles.spectra import gaussian


def test_matches_numpy():
    matrix = gaussian(30, 20)

    assert_close(spectral_norm(svd(matrix)).item(), float(np.linalg.norm(matrix, 2)))
