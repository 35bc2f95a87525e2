"""Oracle: scipy's principal angles between singular vectors from numpy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.subspaces import top_subspace
from lightning_lowrank.statistics import subspace_overlap
from tests.oracles.spectra import gaussian, with_values


def short_side(matrix, k):
    left, _, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return left[:, :k] if matrix.shape[0] <= matrix.shape[1] else right[:k].T


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25)])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_matches_scipy(shape, k):
    now = gaussian(*shape)
    before = now + 0.3 * gaussian(*shape, seed=1)
    angles = scipy.linalg.subspace_angles(short_side(now, k), short_side(before, k))

    assert_close(
        subspace_overlap(top_subspace(now, k), top_subspace(before, k)).item(), float((np.cos(angles) ** 2).mean())
    )


def test_is_one_with_itself():
    subspace = top_subspace(gaussian(20, 30), 4)

    assert_close(subspace_overlap(subspace, subspace).item(), 1.0)


def test_directions_that_the_matrix_lacks_do_not_count():
    matrix = with_values([3.0, 2.0], (20, 30))

    assert_close(subspace_overlap(top_subspace(matrix, 8), top_subspace(2 * matrix, 8)).item(), 1.0)


def test_zero_matrix_overlaps_with_nothing():
    zero, other = top_subspace(torch.zeros(20, 30), 4), top_subspace(gaussian(20, 30), 4)

    assert (
        torch.stack([subspace_overlap(zero, other), subspace_overlap(other, zero), subspace_overlap(zero, zero)])
        .eq(0)
        .all()
    )
