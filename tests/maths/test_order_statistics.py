"""A spectrum in a few numbers."""

import numpy as np
import pytest
import torch

from lightning_lowrank import sketch, svd
from lightning_lowrank.maths.spectra.order_statistics import COUNT, of_noise, order_statistics, ranks


@pytest.mark.parametrize("short", [1, 2, 31, 32, 33, 40, 64, 500, 4096])
def test_ranks_ascend_from_the_largest_value_to_the_smallest(short: int) -> None:
    found = ranks(short)

    assert found[0] == 0 and found[-1] == short - 1 and len(found) == min(short, COUNT)
    assert list(found) == sorted(set(found))


@pytest.mark.parametrize("shape", [(3, 20, 7), (2, 80, 50), (40, 40), (1, 1)])
def test_they_are_the_singular_values_at_the_ranks(shape: tuple[int, ...], generator: torch.Generator) -> None:
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)

    found = order_statistics(svd(matrices))

    values = np.linalg.svd(matrices.numpy(), compute_uv=False)
    at = list(ranks(min(shape[-2:])))
    torch.testing.assert_close(found[0], torch.linalg.norm(matrices, dim=(-2, -1)))
    torch.testing.assert_close(found[1 : 1 + len(at)].movedim(0, -1).numpy(), values[..., at], rtol=1e-9, atol=1e-9)
    assert found.shape == (1 + COUNT, *shape[:-2]) and found[1 + len(at) :].isnan().all()


def test_those_of_an_estimate_are_near(generator: torch.Generator) -> None:
    matrix = torch.randn(400, 500, generator=generator)

    found = order_statistics(sketch(matrix, generator=generator))

    torch.testing.assert_close(found[:30], order_statistics(svd(matrix))[:30].to(found), rtol=0.15, atol=0)


def test_a_matrix_that_is_not_finite_has_none() -> None:
    found = order_statistics(svd(torch.full((2, 3, 4), torch.nan)))

    assert found.isnan().all()


def test_noise_has_what_gaussian_matrices_have(generator: torch.Generator) -> None:
    matrices = torch.randn(50, 96, 64, generator=generator, dtype=torch.float64)

    mean = order_statistics(svd(matrices / torch.linalg.matrix_norm(matrices)[:, None, None])).mean(1)[1:]

    torch.testing.assert_close(mean[:-1], of_noise((96, 64))[:-1], rtol=0.03, atol=0)
