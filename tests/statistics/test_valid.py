"""Oracle: networks that have a spectrum and such that have none."""

import pytest
import torch

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.statistics import valid
from tests import scalings
from tests.oracles.spectra import gaussian


@pytest.mark.parametrize("cascade", scalings.CASCADES)
def test_cascades_have_a_spectrum(cascade):
    assert valid(scalings.cascade(*cascade)) == 1


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.1])
def test_weights_have_a_spectrum(spread):
    assert valid(rank_scaling(scalings.jittered(256, 256, spread=spread))) == 1


@pytest.mark.parametrize(
    "weights", [torch.zeros(64, 64), torch.ones(64, 64), gaussian(64, 31), scalings.jittered(256, 256, spread=0.5)]
)
def test_some_have_none(weights):
    assert valid(rank_scaling(weights)) == 0
