"""Oracle: traces of the Gram matrix, without any spectrum."""

import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import participation_ratio
from tests.oracles.spectra import gaussian


def test_matches_traces():
    matrix = gaussian(30, 20)
    gram = matrix @ matrix.T

    assert_close(participation_ratio(svd(matrix)), torch.trace(gram) ** 2 / torch.trace(gram @ gram))
