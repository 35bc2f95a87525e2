"""Oracle: scipy's regression at every order."""

from scipy.stats import linregress
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.maths.scaling.scaling import ORDERS
from lightning_lowrank.statistics import scaling_fit
from tests import scalings


def test_is_the_least_r_squared():
    scaling = scalings.uneven()[2]
    x, shares = scaling.masses.mean(0).log(), scaling.masses / scaling.masses[:, -1].mean()
    expected = min(linregress(x, (shares**q).sum(0).log()).rvalue ** 2 for q in ORDERS if abs(q) >= 0.5)

    assert_close(scaling_fit(scaling).item(), float(expected), rtol=0, atol=1e-10)


def test_is_one_for_a_power_law():
    assert_close(scaling_fit(scalings.cascade((1, 2), 3, 6)).item(), 1.0, rtol=0, atol=1e-10)


def test_is_low_where_curves_bend():
    assert float(scaling_fit(rank_scaling(scalings.jittered(256, 256, spread=0.5)))) < 0.95
