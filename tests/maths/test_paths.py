"""Oracle: Dijkstra's algorithm by scipy, on the whole network as a sparse matrix."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.boxes import box_counting
from lightning_lowrank.maths.scaling.paths import path_distances, path_scaling
from lightning_lowrank.maths.scaling.scaling import ORDERS
from tests.oracles import networks
from tests.oracles.spectra import gaussian, generator

SIZES = [7, 20, 33, 12, 9]


def chain(density=1.0, seed=0):
    """Weights of successive layers, some of them zero."""
    draws = [gaussian(one, other, seed=seed + i) for i, (one, other) in enumerate(pairwise(SIZES))]
    return [draw * (gaussian(*draw.shape, seed=50 + i).abs() < 5 * density) for i, draw in enumerate(draws)]


@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("density", [1.0, 0.02])
def test_distances_are_exactly_dijkstras(directed, density):
    sources = torch.tensor([0, 3, 9, 40, 80])
    expected = networks.chain_distances(
        [weight.numpy() for weight in chain(density)], sources.numpy(), directed=directed
    )

    assert_close(path_distances(chain(density), sources, directed=directed), torch.as_tensor(expected), rtol=0, atol=0)


def test_nothing_that_memory_held_before_ends_the_search(monkeypatch):
    weights, sources = chain(0.02), torch.arange(9)
    expected = networks.chain_distances([weight.numpy() for weight in weights], sources.numpy(), directed=False)
    monkeypatch.setattr(torch, "empty_like", torch.clone)

    assert_close(path_distances(weights, sources), torch.as_tensor(expected), rtol=0, atol=0)


def test_precision_of_the_weights_is_kept():
    weights = [weight.float() for weight in chain()]
    expected = networks.chain_distances([weight.double().numpy() for weight in weights], np.arange(5), directed=False)

    assert_close(path_distances(weights, torch.arange(5)), torch.as_tensor(expected), rtol=0, atol=0)


def test_without_edges_there_is_no_way():
    distances = path_distances([torch.zeros(3, 4), torch.ones(4, 2)], torch.tensor([0]))

    assert_close(distances, torch.tensor([[0.0] + [torch.inf] * 8], dtype=torch.float64), rtol=0, atol=0)


def test_layers_that_do_not_meet_are_refused():
    with pytest.raises(ValueError, match="matrix 1 ends with 5 neurons"):
        path_distances([torch.ones(3, 4), torch.ones(4, 5), torch.ones(6, 2)], torch.tensor([0]))


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="matrix 1"):
        path_distances([torch.ones(3, 4), torch.full((4, 5), torch.nan)], torch.tensor([0]))


def test_short_ranges_are_warned_of():
    with pytest.warns(UserWarning, match="decades"):
        path_scaling([gaussian(64, 64, seed=i) for i in range(3)], generator=generator(), num_sources=32)


def test_masses_grow_from_five_neurons_to_half_of_all():
    with pytest.warns(UserWarning, match="decades"):
        scaling = path_scaling([gaussian(64, 64, seed=i) for i in range(3)], generator=generator(), num_sources=64)

    assert_close(scaling.mean_masses[[0, -1]], torch.tensor([5.0, 128.0], dtype=torch.float64), rtol=0.05, atol=0)


def test_stacked_cascades_have_the_exponents_of_one():
    """Two steps of at most r lead to the whole of a class in all three layers, and one out of it takes 3 r."""
    weights = 1 / torch.as_tensor(networks.cascade_distances((1, 2), 3, 5)).clamp(min=3.0**-5)
    distances = path_distances([weights, weights], torch.arange(3 * 243))
    scaling = box_counting(distances, [2.001 * 3.0**-k for k in range(5, -1, -1)])

    assert_close(scaling.tau, torch.as_tensor(networks.cascade_tau((1, 2), 3, ORDERS)), rtol=0, atol=1e-10)


def test_neurons_without_ways_are_refused():
    with pytest.raises(ValueError, match="can be reached"):
        path_scaling([torch.zeros(20, 20), torch.zeros(20, 20)], generator=generator())
