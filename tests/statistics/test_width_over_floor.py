"""Oracle: the closed form of a cascade over numpy's slope of the noise; and matrices of independent weights."""

from dataclasses import replace

import numpy as np
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.statistics import width_over_floor
from tests import scalings
from tests.oracles.networks import cascade_alpha
from tests.oracles.spectra import gaussian


def test_of_a_cascade():
    scaling = scalings.cascade((1, 2), 3, 6)
    first, last = cascade_alpha((1, 2), 3, [-3.0, 3.0])
    slope = np.polyfit(np.arange(7) * np.log(3), 1 / scaling.masses.numpy().mean(0), 1)[0]

    assert_close(width_over_floor(scaling).item(), float((first - last) / (6 * abs(slope))), rtol=1e-10, atol=0)


def test_is_about_one_for_independent_weights_of_any_shape():
    for shape in ((256, 256), (64, 1024)):
        found = width_over_floor(rank_scaling(gaussian(24, *shape)))

        assert_close(found.nanmean().item(), 1.15, rtol=0, atol=0.25)


def test_is_not_defined_without_noise():
    scaling = scalings.cascade((1, 2), 3, 6)

    assert width_over_floor(replace(scaling, noise=0 * scaling.fit)).isnan()
