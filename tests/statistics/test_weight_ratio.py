"""Oracle: numpy's 2-norms."""

import numpy as np
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import weight_ratio
from tests.oracles.spectra import gaussian


def test_matches_numpy():
    change, weight = gaussian(30, 20), gaussian(30, 20, seed=1)
    expected = np.linalg.norm(change, 2) / np.linalg.norm(weight, 2)

    assert_close(weight_ratio(svd(change), svd(weight)).item(), float(expected))


def test_is_nan_on_a_weight_of_zero():
    assert torch.isnan(weight_ratio(svd(torch.ones(3, 3)), svd(torch.zeros(3, 3))))
