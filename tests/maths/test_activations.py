"""Oracle: the definitions of Sokar et al. (2023), written out in numpy."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.activations import dormancy_scores, dormant_share


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
