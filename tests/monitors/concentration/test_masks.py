"""Masks of the largest weights, against sets and planted cases."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.monitors.concentration.inequality import gini
from lightning_lowrank.monitors.concentration.masks import (
    hamming,
    hamming_chance,
    jaccard,
    jaccard_chance,
    mask,
    memberships,
    sparsity_at_energy,
)
from lightning_lowrank.monitors.concentration.tickets import Tickets


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
    first, second = (
        mask(memberships(torch.rand(200_000, generator=torch.Generator().manual_seed(i)), [density]), 0) for i in (0, 1)
    )

    assert float(hamming(first, second)) == pytest.approx(hamming_chance(density), abs=0.005)
    assert float(jaccard(first, second)) == pytest.approx(jaccard_chance(density), abs=0.005)


def test_distances_are_those_of_sets() -> None:
    first, second = torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([1, 0, 1, 1, 0]).bool()

    assert float(hamming(first, second)) == pytest.approx(3 / 5)
    assert float(jaccard(first, second)) == pytest.approx(1 / 4)


def test_sparsity_leaves_out_what_has_one_per_cent_of_the_energy() -> None:
    weights = np.abs(np.random.default_rng(0).normal(size=5000))

    kept = next(
        i for i in range(5001) if np.sort(weights)[::-1][:i] @ np.sort(weights)[::-1][:i] >= 0.99 * weights @ weights
    )
    assert float(sparsity_at_energy(torch.tensor(weights))) == pytest.approx(1 - kept / 5000)
    assert sparsity_at_energy(torch.zeros(5)).isnan()


def signals(rows: Iterable[torch.Tensor]) -> list[float]:
    tickets = Tickets([0.5], seed=0)
    return [float(tickets.compared([row]).get("mask_early_bird_0.5", torch.tensor(math.nan))) for row in rows]


def drifting(num_samples: int, until: float) -> Iterator[torch.Tensor]:
    """The largest half moves along 1000 weights, as far in each sample, and stays after that part of the samples."""
    for sample in range(num_samples):
        yield (1000 - (torch.arange(2000) - 500 - min(sample, until * num_samples) * 400 / num_samples).abs()).clamp(1)


@pytest.mark.parametrize("num_samples", [10, 40, 200])
def test_a_steady_drift_has_a_half_at_any_cadence(num_samples: int) -> None:
    found = [value for value in signals(drifting(num_samples, 1)) if math.isfinite(value)]

    assert all(0.48 <= value <= 0.7 for value in found)
    assert len(found) > num_samples // 2


@pytest.mark.parametrize("num_samples", [10, 40, 200])
def test_a_mask_that_stays_has_emerged_after_as_many_samples_again(num_samples: int) -> None:
    found = signals(drifting(num_samples, 0.4))

    assert found[-1] == 0
    assert not any(value < 0.2 for value in found[: num_samples // 2])


def test_masks_that_alternate_never_emerge() -> None:
    up, down = torch.arange(1.0, 11.0), torch.arange(10.0, 0.0, -1)

    assert signals([up, down] * 4)[4:] == pytest.approx([math.nan, 1.0] * 2, nan_ok=True)


def test_a_mask_that_has_hardly_moved_has_nothing_to_settle() -> None:
    first = torch.arange(1.0, 1001.0)
    swapped = first.clone()
    swapped[[499, 500]] = first[[500, 499]]

    assert all(map(math.isnan, signals([first] * 8)))
    assert all(map(math.isnan, signals([first] + [swapped] * 8)))


def test_masks_of_half_the_samples_ago_take_no_more_memory_with_time() -> None:
    tickets = Tickets([0.5], seed=0)
    for row in drifting(300, 1):
        tickets.compared([row])

    assert tickets.num_bytes < 11 * 2000


def test_weights_that_were_not_finite_for_a_while_leave_no_trace_in_later_masks() -> None:
    tickets, row = Tickets([0.5], seed=0), torch.arange(10.0)
    tickets.compared([row])
    tickets.compared([torch.full_like(row, torch.nan)])

    assert float(tickets.compared([row])["mask_hamming_0.5"]) == 0


def test_one_sort_gives_what_each_number_gives_by_itself() -> None:
    row = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    row[:40], row[40:80] = 0, row[80]

    found = Tickets([0.1], seed=0).compared([row])

    assert_close(found["weight_gini"], gini(row.abs()), rtol=1e-12, atol=0)
    assert_close(found["weight_sparsity_0.99"], sparsity_at_energy(row.abs()), rtol=0, atol=0)


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


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, complex(math.nan, -math.nan)])
def test_weights_that_are_not_finite_give_no_numbers(wrong: complex) -> None:
    found = Tickets([0.5], seed=0).compared([torch.tensor([1.0, wrong, 2.0])])

    assert all(value.isnan() for value in found.values())
