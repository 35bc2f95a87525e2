"""Oracle: statistics of many networks drawn from one law."""

import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank import statistics
from lightning_lowrank.maths.scaling.bootstrap import TRUSTED, standard_error
from lightning_lowrank.maths.scaling.scaling import Scaling
from tests import scalings
from tests.oracles.spectra import generator


def samples(nodes, times):
    """Some nodes of a cascade, drawn again and again."""
    whole = scalings.cascade((1, 2), 3, 6)
    drawn = torch.randint(len(whole.masses), (times, nodes), generator=generator())
    assert whole.log_radii is not None
    return Scaling(whole.masses[drawn], whole.fit.expand(times, -1), whole.log_radii.expand(times, -1))


@pytest.mark.parametrize("name", sorted(set(TRUSTED)))
def test_is_the_spread_of_other_samples(name):
    spread = TRUSTED[name](samples(256, 400)).std()

    assert_close(standard_error(name, samples(256, 1)[0], generator=generator()), spread, rtol=0.3, atol=0)


@pytest.mark.parametrize("name", sorted(set(TRUSTED)))
def test_intervals_hold_the_truth_as_often_as_they_say(name):
    """Nine times in ten, give or take."""
    drawn, truth = samples(256, 60), TRUSTED[name](scalings.cascade((1, 2), 3, 6))
    inside = (TRUSTED[name](drawn) - truth).abs() < 1.645 * standard_error(
        name, drawn, generator=generator(1), num_resamples=100
    )

    assert 0.8 <= float(inside.double().mean()) <= 0.97


@pytest.mark.parametrize("name", sorted(TRUSTED))
def test_resamples_the_statistic_of_that_name(name):
    scaling = samples(256, 1)

    assert_close(TRUSTED[name](scaling), getattr(statistics, name)(scaling), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["width", "asymmetry", "scaling_fit"])
def test_there_is_none_of_what_extremes_rule(name):
    assert bool(standard_error(name, samples(256, 1), generator=generator()).isnan())


def test_there_is_none_of_few_nodes():
    assert bool(standard_error("alpha0", samples(255, 1), generator=generator()).isnan())


def test_there_is_none_without_a_spectrum():
    constant = Scaling(torch.ones(300, 6).double(), torch.ones(6).double())

    assert bool(standard_error("alpha0", constant, generator=generator()).isnan())
