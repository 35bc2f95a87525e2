"""Oracle: the published recipe in plain loops, with scipy's regression."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank import statistics
from lightning_lowrank.maths.scaling.multifractal import multifractal_spectrum
from lightning_lowrank.maths.scaling.neuromfa import (
    emergence,
    neuromfa_scaling,
    published_summary,
    sample_neurons,
    typical_threshold,
)
from lightning_lowrank.maths.scaling.nulls import gaussian_like, shuffled
from lightning_lowrank.maths.scaling.scaling import ORDERS
from tests import scalings
from tests.oracles import networks
from tests.oracles.spectra import gaussian, generator


def network(seed=0):
    """Weights of three layers, some of them zero."""
    draws = [
        0.04 * scalings.jittered(*shape, spread=0.2, seed=seed + i)
        for i, shape in enumerate([(40, 96), (96, 96), (96, 24)])
    ]
    return [torch.where(draw.abs() < 0.002, 0.0, draw) for draw in draws]


def lengths(weights):
    return [[1 / abs(w) for w in row if w != 0] for weight in weights for row in weight.numpy()]


@pytest.mark.parametrize("threshold", [150.0, 60.0, 30.5])
def test_tau_is_that_of_the_published_recipe(threshold):
    expected, _, _ = networks.published_tau(lengths(network()), ORDERS, threshold)

    assert_close(neuromfa_scaling(network(), threshold=threshold).tau, torch.as_tensor(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("threshold", [150.0, 60.0])
def test_summary_is_that_of_the_published_recipe(threshold):
    _, alpha0, width = networks.published_tau(lengths(network()), ORDERS, threshold)
    found = torch.stack(published_summary(neuromfa_scaling(network(), threshold=threshold)))

    # Differences of tau over steps of 0.1.
    assert_close(found, torch.tensor([alpha0, width]), rtol=0, atol=2e-11)


def test_emergence_is_that_of_the_published_recipe():
    before, after = (
        networks.published_tau(lengths(network()), ORDERS, 150),
        networks.published_tau(lengths(network(7)), ORDERS, 150),
    )
    expected = after[2] / before[2] * np.log(before[1] / after[1])
    first, now = (published_summary(neuromfa_scaling(network(seed))) for seed in (0, 7))

    assert_close(emergence(*now, *first).item(), expected, rtol=0, atol=1e-10)


def test_tau_of_a_cascade():
    """Lengths 2, 6, 18, ...: the integers at which its masses grow."""
    weights = torch.as_tensor(networks.cascade_weights((1, 2), 3, 6)) / (2 * 3.0**6)
    expected = torch.as_tensor(networks.cascade_tau((1, 2), 3, ORDERS))

    assert_close(neuromfa_scaling([weights], threshold=2 * 3.0**6).tau, expected, rtol=0, atol=1e-10)


def test_maximum_of_the_spectrum_is_zero():
    scaling = neuromfa_scaling(network())

    assert_close(scaling.f[30].item(), 0.0, rtol=0, atol=1e-12)


def test_exact_derivatives_are_near_the_published_differences():
    scaling = neuromfa_scaling(network())
    alpha0, width = published_summary(scaling)

    assert_close(
        torch.stack([scaling.alpha_at(0.0), statistics.width(scaling)]), torch.stack([alpha0, width]), rtol=0.06, atol=0
    )


def test_nodes_are_columns_unless_rows_are_asked():
    weights = network()
    expected = neuromfa_scaling([weight.mT for weight in weights]).tau

    assert_close(multifractal_spectrum(weights, "neuromfa").tau, expected, rtol=0, atol=0)


def test_all_neurons_of_a_sample_are_all():
    drawn = neuromfa_scaling(network(), max_neurons=1000, num_repeats=1, generator=generator())

    assert_close(drawn.tau[0], neuromfa_scaling(network()).tau, rtol=0, atol=1e-12)


def test_repeats_are_other_samples():
    scaling = neuromfa_scaling(network(), max_neurons=20, num_repeats=4, generator=generator())

    assert len(set(scaling.alpha_at(0.0).tolist())) == 4


def test_the_same_generator_draws_the_same_neurons():
    one, other = (
        neuromfa_scaling(network(), max_neurons=20, num_repeats=2, generator=generator()).tau for _ in range(2)
    )

    assert_close(one, other, rtol=0, atol=0)


def test_layers_of_a_sample_are_a_chain():
    """Entries name the neurons that they join."""
    first = torch.arange(8)[:, None] * 100.0 + torch.arange(12)
    second = torch.arange(12)[:, None] * 100.0 + torch.arange(8)
    one, other = sample_neurons([first, second], 4, generator=generator())

    assert_close(one[0] % 100, torch.div(other[:, 0], 100, rounding_mode="floor"))


@pytest.mark.parametrize(("width", "sampled"), [(32, 8), (64, 16), (96, 24), (128, 16)])
def test_wider_layers_are_sampled_as_published(width, sampled):
    """8 of 32 neurons, 24 of fused queries, keys and values, 16 of four times as many."""
    (sample,) = sample_neurons([torch.zeros(32, width)], 8, generator=generator())

    assert sample.shape == (8, sampled)


def test_neurons_are_not_drawn_without_a_generator():
    with pytest.raises(ValueError, match="give a generator"):
        neuromfa_scaling(network(), max_neurons=8)


def test_a_layer_that_is_not_finite_is_no_number():
    weights = network()
    weights[1][3, 4] = torch.nan

    assert bool(neuromfa_scaling(weights).tau.isnan().all())


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_without_edges_of_the_right_length_there_is_no_number(scale):
    scaling = neuromfa_scaling([scale * weight for weight in network()])

    assert bool(statistics.alpha0(scaling).isnan()) and statistics.valid(scaling) == 0


def test_growing_weights_alone_raise_emergence():
    """What the nulls are for."""
    first, now = (published_summary(neuromfa_scaling([gaussian(64, 64) * scale])) for scale in (0.01, 0.02))

    assert float(emergence(*now, *first)) > 0.1


def test_emergence_is_not_defined_without_a_width():
    one = torch.ones(3, dtype=torch.float64)

    assert bool(
        emergence(torch.tensor([1.0, 1.0, -1.0]).double(), one, torch.tensor([1.0, -1.0, 1.0]).double(), 1e-4 * one)
        .isnan()
        .all()
    )


def test_hooks_are_dropped_where_asked():
    spoilt = neuromfa_scaling([scalings.jittered(64, 64, spread=1.0) * 0.1])
    alpha0, width = published_summary(spoilt, drop_hooks=True, drop_non_monotone=True)

    assert bool(alpha0.isnan()) and bool(width.isnan())


def test_shuffled_weights_have_the_same_entries():
    weight = gaussian(30, 40)

    assert_close(
        shuffled(weight, generator=generator()).flatten().sort().values, weight.flatten().sort().values, rtol=0, atol=0
    )


def test_shuffled_weights_have_no_dispersion():
    weight = scalings.jittered(256, 256, spread=0.3)
    scaling = multifractal_spectrum(shuffled(weight, generator=generator()))

    assert statistics.dispersion(scaling) < statistics.dispersion_chance(scaling)


def test_gaussian_weights_have_the_same_mean_and_variance():
    weight = 3 + 0.5 * gaussian(200, 300).exp()
    like = gaussian_like(weight, generator=generator())

    assert_close(torch.stack([like.mean(), like.std()]), torch.stack([weight.mean(), weight.std()]), rtol=0.01, atol=0)


def test_typical_threshold_is_three_over_the_root_mean_square():
    assert_close(typical_threshold([0.1 * torch.ones(4, 4), -0.1 * torch.ones(2, 8)]).item(), 30.0)
