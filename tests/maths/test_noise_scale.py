"""Noise from parts of a batch. Oracles: sample variances and jackknives in numpy, and Gaussian gradients that are
drawn.
"""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.noise_scale import noise_variance, ratio_of_means

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_variance_is_that_of_the_mean_of_the_parts(num_parts: int) -> None:
    parts = RNG.normal(size=(num_parts, 5)) + 1
    expected = np.var(parts, axis=0, ddof=1).sum() / num_parts

    mean, total = (parts**2).sum(1).mean(), (parts.mean(0) ** 2).sum()
    found = noise_variance(torch.tensor(mean), torch.tensor(total), torch.tensor(float(num_parts)))

    assert found.item() == pytest.approx(expected)


def test_a_single_part_has_no_variance() -> None:
    one = torch.ones(())

    assert noise_variance(one, one, one).isnan()


def test_error_is_that_of_the_jackknife() -> None:
    above, below = RNG.normal(3, 1, 12), RNG.normal(5, 1, 12)
    left_out = [np.delete(above, i).mean() / np.delete(below, i).mean() for i in range(12)]
    error = np.sqrt(11 / 12 * np.square(np.array(left_out) - np.mean(left_out)).sum())

    found = ratio_of_means(torch.tensor(above), torch.tensor(below))

    assert found.value.item() == pytest.approx(above.mean() / below.mean())
    assert found.error.item() == pytest.approx(error, rel=0.13)  # times half of Student's 2.2
    assert found.error.item() > error


def test_what_is_not_finite_does_not_count() -> None:
    above, below = torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([1.0, 1.0, 1.0, torch.inf])

    found, without = ratio_of_means(above, below), ratio_of_means(above[:2], below[:2])

    assert_close(found.value, without.value)
    assert 0 < found.error < without.error  # of fewer samples Student's width is larger


def test_means_that_are_not_positive_and_single_samples_are_blank() -> None:
    assert ratio_of_means(torch.ones(2), torch.tensor([1.0, -2.0])).value.isnan()
    alone = ratio_of_means(torch.ones(1), torch.ones(1))
    assert (alone.value, alone.error.isnan().item()) == (1, True)


def test_truth_is_within_the_errors() -> None:
    """Of gradients in 30 directions with as much noise as signal, halves of 20 batches in each trial."""
    within = []
    for _ in range(300):
        halves = torch.from_numpy(RNG.normal(0.3, 0.3 * np.sqrt(2), size=(20, 2, 30)))
        mean, total = halves.square().sum(-1).mean(-1), halves.mean(1).square().sum(-1)
        variance = noise_variance(mean, total, torch.full((20,), 2.0))
        found = ratio_of_means(variance, total - variance)
        within.append(abs(found.value.item() - 1) / found.error.item())

    assert np.mean(np.array(within) < 1) > 0.6
    assert np.mean(np.array(within) < 2) > 0.9
