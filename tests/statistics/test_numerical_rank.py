"""Oracle: numpy.linalg.matrix_rank with the same cut."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import numerical_rank
from tests.oracles.spectra import gaussian, with_values


@pytest.mark.parametrize("rank", [0, 1, 5, 20])
def test_matches_numpy_on_exact_ranks(rank):
    matrix = gaussian(30, rank) @ gaussian(rank, 20, seed=1)

    assert_close(numerical_rank(svd(matrix)).item(), float(np.linalg.matrix_rank(matrix)))


def test_matches_numpy_in_float32():
    matrix = with_values(np.logspace(0, -7, 20), (30, 20)).float()
    expected = np.linalg.matrix_rank(matrix.double(), rtol=30 * 2.0**-23)

    assert_close(numerical_rank(svd(matrix)).item(), float(expected))


def test_bfloat16_has_full_rank():
    matrix = torch.outer(gaussian(30), gaussian(20, seed=1)).bfloat16()

    assert numerical_rank(svd(matrix)).item() == 20
