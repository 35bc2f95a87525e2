"""Oracle: numpy's singular values of the matrix itself."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import (
    Spectrum,
    descending,
    eigenvalues,
    from_gram,
    perplexity,
    ratio,
    svd,
)
from tests.oracles.spectra import gaussian, singular_values


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25), (1, 5), (5, 1)])
def test_values_are_singular_values(shape):
    matrix = gaussian(*shape)

    assert_close(svd(matrix).values, torch.from_numpy(singular_values(matrix)))


def test_complex_values_are_singular_values():
    matrix = torch.complex(gaussian(6, 9), gaussian(6, 9, seed=1))

    assert_close(svd(matrix).values, torch.from_numpy(np.linalg.svd(matrix.numpy(), compute_uv=False)))


def test_integer_matrices_are_widened():
    matrix = torch.arange(12).reshape(3, 4)

    assert_close(svd(matrix).values, svd(matrix.double()).values)


def test_strided_views_are_read_as_they_are():
    matrix = gaussian(40, 60)[::2, ::3].mT

    assert_close(svd(matrix).values, svd(matrix.contiguous()).values)


@pytest.mark.parametrize("scale", [1e-300, 1e-38, 1e38, 1e300])
def test_any_scale(scale):
    matrix = gaussian(6, 9)

    assert_close(svd(scale * matrix).values, scale * svd(matrix).values, rtol=1e-12, atol=0)


def test_both_gram_matrices_give_the_same():
    matrix = gaussian(6, 9)

    assert_close(from_gram(matrix.mT @ matrix, shape=(6, 9)).values, from_gram(matrix @ matrix.mT, shape=(6, 9)).values)


def test_rounding_below_zero_counts_as_zero():
    assert_close(from_gram(torch.diag(torch.tensor([4.0, -1e-7]))).values, torch.tensor([2.0, 0.0]))


def test_autocast_does_not_reach_in():
    matrix = gaussian(20, 30, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = svd(matrix).values

    assert_close(values, svd(matrix).values, rtol=0, atol=0)


def test_no_graph_is_kept():
    assert not svd(gaussian(4, 4).requires_grad_()).values.requires_grad


def test_energy_is_the_squared_frobenius_norm():
    matrix = gaussian(3, 6, 9)

    assert_close(svd(matrix).energy, matrix.square().sum((-2, -1)))


def test_one_failure_of_the_solver_stays_alone(monkeypatch):
    batch = gaussian(3, 4, 4)
    batch = batch @ batch.mT
    solver = torch.linalg.eigvalsh

    def failing(symmetric, **options):
        if (symmetric == batch[1]).all(-1).all(-1).any():
            raise torch.linalg.LinAlgError
        return solver(symmetric, **options)

    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)

    assert torch.equal(eigenvalues(batch).isnan().any(-1), torch.tensor([False, True, False]))


def test_part_of_a_batch():
    matrices = gaussian(5, 6, 9)

    assert_close(svd(matrices)[1:3].values, svd(matrices[1:3]).values)


def test_part_of_an_estimate_keeps_its_probes():
    values = gaussian(2, 5, 3).abs()
    estimate = Spectrum(
        values, values, (9, 9), whole=False, num_probes=2, coarse=Spectrum(values, values, (9, 9), num_probes=2)
    )
    part = estimate[1]

    assert part.values.shape == part.coarse.values.shape == (2, 3)


def test_descending_is_by_magnitude():
    values, weights = descending(torch.tensor([1.0, -3.0, 2.0]), torch.tensor([10.0, 30.0, 20.0]))

    assert torch.equal(torch.stack([values, weights]), torch.tensor([[-3.0, 2.0, 1.0], [30.0, 20.0, 10.0]]))


def test_perplexity_of_equal_masses_is_their_number():
    assert_close(perplexity(torch.full((7,), 0.3), torch.ones(7)), torch.tensor(7.0))


def test_ratio_is_zero_over_zero():
    assert torch.equal(
        ratio(torch.tensor([1.0, 0.0, 6.0]), torch.tensor([0.0, 0.0, 2.0])), torch.tensor([0.0, 0.0, 3.0])
    )
