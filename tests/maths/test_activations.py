"""Oracle: the published definitions, written out in numpy."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.activations import (
    channel_kurtosis,
    dormancy_scores,
    dormant_share,
    massive_count,
    massive_ratio,
    row_uniformity,
)


def test_scores_are_magnitudes_over_their_mean() -> None:
    magnitudes = np.abs(np.random.default_rng(0).normal(size=(3, 50)))

    assert_close(dormancy_scores(torch.from_numpy(magnitudes)).numpy(), magnitudes / magnitudes.mean(-1, keepdims=True))


@pytest.mark.parametrize("tau", [0.0, 0.025, 0.5])
def test_share_counts_scores_up_to_tau(tau: float) -> None:
    magnitudes = np.abs(np.random.default_rng(1).normal(size=(4, 40)))
    magnitudes[:, ::3] = 0
    expected = [np.mean([m / row.mean() <= tau for m in row]) for row in magnitudes]

    assert_close(dormant_share(torch.from_numpy(magnitudes), tau).numpy(), np.array(expected))


def test_a_silent_layer_is_dormant_and_one_that_is_not_finite_is_blank() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, torch.nan], [1.0, torch.inf], [1.0, 1.0]])

    assert_close(dormant_share(rows), torch.tensor([1.0, torch.nan, torch.nan, 0.0]), equal_nan=True)


def test_channels_are_compared_with_the_median_one() -> None:
    tops = np.exp(np.random.default_rng(2).normal(size=(3, 41)) * 3)
    ranked = np.sort(tops, -1)

    assert_close(massive_ratio(torch.from_numpy(tops)).numpy(), ranked[:, -1] / ranked[:, 20])
    assert_close(
        massive_count(torch.from_numpy(tops), 10.0).numpy(), (tops > 10 * ranked[:, 20:21]).sum(-1).astype(float)
    )


def test_kurtosis_and_uniformity_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(3)
    squares, matrix = rng.exponential(size=(3, 30)), rng.normal(size=(2, 5, 7)) * rng.exponential(size=(2, 5, 1))
    norms = (matrix**2).sum(-1)

    assert_close(channel_kurtosis(torch.from_numpy(squares)).numpy(), (squares**2).mean(-1) / squares.mean(-1) ** 2)
    assert_close(
        row_uniformity(torch.from_numpy(matrix)).numpy(), norms.sum(-1) ** 2 / (norms**2).sum(-1) / norms.shape[-1]
    )


def test_silent_channels_have_no_massive_one_and_what_is_not_finite_is_blank() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, torch.nan]])

    assert_close(massive_ratio(rows), torch.tensor([0.0, 0.0, torch.nan]), equal_nan=True)
    assert_close(massive_count(rows), torch.tensor([0.0, 0.0, torch.nan]), equal_nan=True)
    assert_close(channel_kurtosis(rows), torch.tensor([0.0, 3.0, torch.nan]), equal_nan=True)
    assert_close(row_uniformity(torch.zeros(2, 3)), torch.tensor(0.0))
