"""Oracle: the closed form of a cascade."""

import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics import width
from tests import scalings
from tests.oracles.networks import cascade_alpha


@pytest.mark.parametrize("cascade", scalings.CASCADES)
def test_is_that_of_a_cascade(cascade):
    parts, base, _ = cascade
    first, last = cascade_alpha(parts, base, [-3.0, 3.0])

    assert_close(width(scalings.cascade(*cascade)).item(), float(first - last), rtol=0, atol=1e-10)


def test_is_over_the_orders_asked():
    cascade = scalings.cascade((1, 2), 3, 6)
    first, last = cascade_alpha((1, 2), 3, [-1.0, 2.0])
    some = Scaling(cascade.masses, cascade.fit, cascade.log_radii, orders=(-1.0, 0.0, 2.0))

    assert_close(width(some), torch.tensor(first - last), rtol=0, atol=1e-10)
