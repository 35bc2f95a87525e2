"""Oracle: numpy's own norms, which share no code with torch.linalg.eigvalsh."""

import numpy as np
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import stable_rank
from tests.oracles.spectra import gaussian


def test_matches_norms():
    matrix = gaussian(30, 20)
    expected = np.linalg.norm(matrix, "fro") ** 2 / np.linalg.norm(matrix, 2) ** 2

    assert_close(stable_rank(svd(matrix)).item(), float(expected))
