"""Oracles: numpy's nuclear and Frobenius norms, scipy's matrix power, and the factorisation that the quasi-norm comes
from.
"""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import schatten_quasi_norm
from tests.oracles.spectra import gaussian


@pytest.mark.parametrize(("p", "order"), [(1.0, "nuc"), (2.0, "fro")])
def test_matches_numpy_norms(p, order):
    matrix = gaussian(30, 20)

    assert_close(schatten_quasi_norm(svd(matrix), p=p).item(), float(np.linalg.norm(matrix, order)))


@pytest.mark.parametrize("p", [0.25, 0.5, 2 / 3, 1.5])
def test_matches_the_trace_of_a_power(p):
    matrix = gaussian(30, 20)
    expected = np.trace(scipy.linalg.fractional_matrix_power((matrix.T @ matrix).numpy(), p / 2)).real ** (1 / p)

    assert_close(schatten_quasi_norm(svd(matrix), p=p).item(), float(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("factors", [2, 3, 4])
def test_is_the_cost_of_balanced_factors(factors):
    """The mean squared Frobenius norm of k factors is least when each holds the k-th root of the singular values."""
    left, values, right = torch.linalg.svd(gaussian(20, 20))
    roots = [torch.diag(values ** (1 / factors))] * factors
    roots[0], roots[-1] = left @ roots[0], roots[-1] @ right
    cost = sum(root.square().sum() for root in roots) / factors

    assert_close(schatten_quasi_norm(svd(gaussian(20, 20)), p=2 / factors) ** (2 / factors), cost)
