"""Oracle: the mean overlap of independent random matrices."""

import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.subspaces import top_subspace
from lightning_lowrank.statistics import subspace_overlap, subspace_overlap_chance
from tests.oracles.spectra import gaussian, with_values


@pytest.mark.parametrize("k", [1, 4, 10])
def test_is_the_mean_over_random_matrices(k):
    now, before = top_subspace(gaussian(400, 20, 30), k), top_subspace(gaussian(400, 20, 30, seed=1), k)

    assert_close(
        subspace_overlap_chance(now, before),
        torch.full((400,), subspace_overlap(now, before).mean().item()).double(),
        rtol=0.05,
        atol=0.002,
    )


def test_of_unequal_dimensions():
    now = top_subspace(torch.stack([with_values([3.0, 2.0], (20, 30), seed=s) for s in range(400)]), 8)
    before = top_subspace(gaussian(400, 20, 30), 8)

    assert_close(
        subspace_overlap_chance(now, before).mean().item(),
        subspace_overlap(now, before).mean().item(),
        rtol=0.05,
        atol=0,
    )
