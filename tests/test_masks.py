"""Masks of the largest weights, against sets and planted cases."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.masks import hamming, hamming_chance, jaccard, jaccard_chance, mask, memberships, sparsity_at_energy
from lightning_lowrank.sources.tickets import Tickets


def test_masks_are_the_largest_weights_and_nested() -> None:
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs()

    found = memberships(weights, [0.5, 0.1])

    order = np.argsort(-weights.numpy())
    for place, count in enumerate((500, 100)):
        assert set(mask(found, place).nonzero()[:, 0].tolist()) == set(order[:count].tolist())


def test_a_pruned_weight_belongs_to_no_mask() -> None:
    assert int(memberships(torch.cat([torch.ones(10), torch.zeros(90)]), [0.5]).sum()) == 10


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_independent_masks_are_apart_by_chance(density: float) -> None:
    first, second = (mask(memberships(torch.rand(200_000, generator=torch.Generator().manual_seed(i)), [density]), 0) for i in (0, 1))

    assert float(hamming(first, second)) == pytest.approx(hamming_chance(density), abs=0.005)
    assert float(jaccard(first, second)) == pytest.approx(jaccard_chance(density), abs=0.005)


def test_distances_are_those_of_sets() -> None:
    first, second = torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([1, 0, 1, 1, 0]).bool()

    assert float(hamming(first, second)) == pytest.approx(3 / 5)
    assert float(jaccard(first, second)) == pytest.approx(1 / 4)


def test_sparsity_leaves_out_what_has_one_per_cent_of_the_energy() -> None:
    weights = np.abs(np.random.default_rng(0).normal(size=5000))

    kept = next(i for i in range(5001) if np.sort(weights)[::-1][:i] @ np.sort(weights)[::-1][:i] >= 0.99 * weights @ weights)
    assert float(sparsity_at_energy(torch.tensor(weights))) == pytest.approx(1 - kept / 5000)
    assert sparsity_at_energy(torch.zeros(5)).isnan()


def signals(rows: list[torch.Tensor]) -> list[float]:
    tickets = Tickets([0.5], seed=0)
    return [float(tickets.compared([row]).get("mask_early_bird_0.5", torch.tensor(math.nan))) for row in rows]


def test_a_mask_that_stays_emerges_at_its_fifth_sample() -> None:
    assert signals([torch.arange(10.0)] * 6) == pytest.approx([math.nan] * 4 + [0, 0], nan_ok=True)


def test_masks_that_alternate_never_emerge() -> None:
    up, down = torch.arange(1.0, 11.0), torch.arange(10.0, 0.0, -1)

    assert signals([up, down] * 4)[4:] == pytest.approx([2.0] * 4)


def test_a_tenth_of_the_weights_is_the_published_threshold_at_half_density() -> None:
    first = torch.arange(1.0, 21.0)
    swapped = first.clone()
    swapped[[9, 10]] = first[[10, 9]]  # one weight in, one out: a tenth of twenty

    assert signals([first] * 4 + [swapped])[-1] == pytest.approx(0.2)


def test_of_many_weights_the_same_are_looked_at() -> None:
    weights = [torch.randn(2**17, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    tickets = Tickets([0.5], seed=0)
    tickets.compared(weights)

    found = tickets.compared(weights)

    assert float(found["mask_hamming_0.5"]) == 0
    assert float(found["weight_gini"]) == pytest.approx(math.sqrt(2) - 1, abs=0.003)
    assert tickets.num_bytes < 2**20


def test_masks_survive_a_checkpoint() -> None:
    rows = [torch.randn(100, generator=torch.Generator().manual_seed(i)) for i in range(7)]
    through, before, after = Tickets([0.1, 0.5], seed=0), Tickets([0.1, 0.5], seed=0), Tickets([0.1, 0.5], seed=0)
    for row in rows[:6]:
        through.compared([row])
        before.compared([row])
    after.load_state_dict(before.state_dict())

    assert_close(after.compared([rows[6]]), through.compared([rows[6]]), rtol=0, atol=0, equal_nan=True)


def test_weights_that_are_not_finite_give_no_numbers() -> None:
    found = Tickets([0.5], seed=0).compared([torch.tensor([1.0, torch.nan, 2.0])])

    assert all(value.isnan() for value in found.values())
