"""Oracle: trial of every count, on numpy's singular values."""

import pytest
import torch

from lightning_lowrank.maths.spectra.spectrum import Spectrum, svd
from lightning_lowrank.statistics import energy_rank
from lightning_lowrank.statistics.registry import find
from tests.oracles.spectra import energy_rank as by_trial
from tests.oracles.spectra import gaussian, singular_values


@pytest.mark.parametrize("epsilon", [0.001, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_matches_trial(epsilon, seed):
    matrix = gaussian(30, 20, seed=seed) @ torch.diag(torch.logspace(0, -seed, 20, dtype=torch.float64))

    assert energy_rank(svd(matrix), epsilon=epsilon).item() == by_trial(singular_values(matrix), epsilon)


@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.3, 0.5, 0.7])
def test_ties_count_as_enough(epsilon):
    assert find(f"energy_rank_{epsilon}")(svd(torch.eye(10))).item() == round(10 * (1 - epsilon))


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.35, 0.6])
def test_is_taken_in_part_from_a_value_that_stands_for_several(epsilon):
    values, counts = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), torch.tensor([2, 5, 40])
    weighted = Spectrum(values, counts.double(), (47, 47), whole=False)
    repeated = values.repeat_interleave(counts)

    assert energy_rank(weighted, epsilon=epsilon).item() == by_trial(repeated.numpy(), epsilon)


def test_thirds_add_up():
    weighted = Spectrum(
        torch.ones(9, dtype=torch.float64), torch.full((9,), 1 / 3, dtype=torch.float64), (3, 3), whole=False
    )

    assert energy_rank(weighted, epsilon=1e-3).item() == 3


def test_rank_of_zero_has_no_sign():
    """`-0` was printed."""
    assert str(energy_rank(svd(torch.zeros(3, 4))).item()) == "0.0"
