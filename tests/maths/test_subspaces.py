"""Oracles: numpy's singular vectors and scipy's principal angles."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.subspaces import Subspace, principal_angles, top_subspace
from tests.oracles.spectra import gaussian, singular_values


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25)])
def test_basis_spans_the_singular_vectors(shape):
    matrix = gaussian(*shape)
    left, _, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    vectors = torch.from_numpy(left[:, :4] if shape[0] <= shape[1] else right[:4].T)
    basis = top_subspace(matrix, 4).basis

    assert_close(basis @ basis.mT, vectors @ vectors.mT)


def test_values_are_singular_values():
    matrix = gaussian(20, 30)

    assert_close(top_subspace(matrix, 4).values, torch.from_numpy(singular_values(matrix)[:4]))


def test_complex_basis_is_orthonormal():
    matrix = torch.complex(gaussian(6, 9), gaussian(6, 9, seed=1))
    basis = top_subspace(matrix, 3).basis

    assert_close(basis.mH @ basis, torch.eye(3, dtype=torch.complex128))


def test_as_many_directions_as_there_are():
    assert top_subspace(gaussian(3, 30), 8).basis.shape == (3, 3)


def test_batch_is_one_by_one():
    matrices = gaussian(4, 20, 30)
    together, alone = top_subspace(matrices, 3), top_subspace(matrices[2], 3)

    assert_close(together.basis[2].abs(), alone.basis.abs())


def test_not_finite_is_nan_there_only():
    matrices = gaussian(3, 5, 6)
    matrices[1, 0, 0] = torch.nan
    basis = top_subspace(matrices, 2).basis

    assert torch.equal(basis.isnan().all(-1).all(-1), torch.tensor([False, True, False]))


def test_principal_angles_match_scipy():
    one, other = (torch.linalg.qr(gaussian(20, 4, seed=s))[0] for s in (0, 1))
    expected = scipy.linalg.subspace_angles(one.numpy(), other.numpy())[::-1].copy()
    angles = principal_angles(*(Subspace(q, torch.ones(4, dtype=torch.float64)) for q in (one, other)))

    assert_close(angles, torch.from_numpy(expected))


def test_principal_angles_with_itself_are_zero():
    subspace = top_subspace(gaussian(20, 30), 4)

    assert_close(principal_angles(subspace, subspace), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-7)


def test_zero_matrix_has_no_dimension():
    assert top_subspace(torch.zeros(2, 5, 6), 3).dimension.eq(0).all()
