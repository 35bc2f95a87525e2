"""Oracle: scipy's entropy, which normalises by itself, of numpy's singular values."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import Spectrum, svd
from lightning_lowrank.statistics import effective_rank_energy
from tests.oracles.spectra import gaussian, singular_values, with_values


@pytest.mark.parametrize("matrix", [gaussian(30, 20), with_values([1, 0.1, 0.01], (20, 30)), torch.ones(4, 4)])
def test_matches_entropy(matrix):
    values = singular_values(matrix)

    assert_close(
        effective_rank_energy(svd(matrix)).item(), float(np.exp(scipy.stats.entropy(values**2))), rtol=1e-6, atol=0
    )


def test_a_weight_is_a_multiplicity():
    values = torch.tensor([3.0, 2.0, 1.0])
    weighted = Spectrum(values, torch.tensor([1.0, 2.0, 3.0]), (6, 6), whole=False)
    repeated = values.repeat_interleave(torch.tensor([1, 2, 3]))

    assert_close(effective_rank_energy(weighted), effective_rank_energy(Spectrum(repeated, torch.ones(6), (6, 6))))
