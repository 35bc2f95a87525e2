"""Oracle: the closed form of a cascade."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics import asymmetry
from tests import scalings
from tests.oracles.networks import cascade_alpha


@pytest.mark.parametrize("cascade", [((1, 2), 3, 6), ((1, 3), 2, 5)])
def test_of_a_cascade(cascade):
    parts, base, _ = cascade
    right, middle, left = cascade_alpha(parts, base, [-3.0, 0.0, 3.0])

    assert_close(
        asymmetry(scalings.cascade(*cascade)).item(),
        float(np.log((middle - left) / (right - middle))),
        rtol=0,
        atol=1e-9,
    )


def test_is_not_defined_without_a_width():
    assert bool(asymmetry(scalings.cascade((1, 1), 3, 9)).isnan())


def test_an_even_spectrum_has_none():
    """Masses whose exponents come in pairs about 2."""
    masses = (torch.tensor([1.95, 2.05], dtype=torch.float64)[:, None] * torch.arange(-6, 1)).exp()

    assert_close(
        asymmetry(Scaling(masses, torch.ones(7).double(), torch.arange(-6, 1).double())).item(), 0.0, rtol=0, atol=1e-9
    )
