"""Oracle: shares of energy from numpy's singular values; scipy's distance of distributions."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cityblock
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.sketch import sketch
from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import spectrum_drift
from tests.oracles.spectra import gaussian, with_values


def shares(matrix):
    energies = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    return energies / energies.sum()


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25), (1, 9)])
def test_matches_numpy(shape):
    now, before = gaussian(*shape), gaussian(*shape, seed=1)

    assert_close(spectrum_drift(svd(now), svd(before)).item(), cityblock(shares(now), shares(before)) / 2)


def test_scale_and_directions_do_not_matter():
    matrix = gaussian(20, 30)
    turned = 3 * torch.linalg.qr(gaussian(20, 20, seed=1))[0] @ matrix

    assert_close(spectrum_drift(svd(turned), svd(matrix)).item(), 0.0, rtol=0, atol=1e-12)


def test_is_what_rank_one_lacks_of_a_flat_spectrum():
    one, flat = svd(with_values([2.0], (20, 30))), svd(with_values([1.0] * 20, (20, 30)))

    assert_close(spectrum_drift(one, flat).item(), 19 / 20)
    assert_close(spectrum_drift(flat, one).item(), 19 / 20)


def test_two_gaussian_matrices_have_what_the_docstring_says():
    for shape, expected in (((64, 64), 0.019), ((16, 64), 0.034)):
        now, before = (torch.stack([gaussian(*shape, seed=2 * i + j) for i in range(50)]) for j in (0, 1))
        assert_close(spectrum_drift(svd(now), svd(before)).mean().item(), expected, rtol=0.1, atol=0)


def test_zero_matrices_and_sketches_have_none():
    zero, other = svd(torch.zeros(20, 30)), svd(gaussian(20, 30))
    estimate = sketch(gaussian(200, 300), generator=torch.Generator().manual_seed(0))

    pairs = [(zero, other), (other, zero), (zero, zero), (estimate, estimate)]
    assert torch.stack([spectrum_drift(*pair) for pair in pairs]).isnan().all()
