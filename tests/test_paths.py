"""Oracle: Dijkstra's algorithm by scipy, on the whole network as a sparse matrix."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.scaling.paths import path_distances, path_scaling
from tests.oracles import networks
from tests.oracles.spectra import gaussian, generator

SIZES = [7, 20, 33, 12, 9]


def chain(density=1.0, seed=0):
    """Weights of successive layers, some of them zero."""
    draws = [gaussian(one, other, seed=seed + i) for i, (one, other) in enumerate(zip(SIZES, SIZES[1:], strict=False))]
    return [draw * (gaussian(*draw.shape, seed=50 + i).abs() < 5 * density) for i, draw in enumerate(draws)]


@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("density", [1.0, 0.02])
def test_distances_are_exactly_dijkstras(directed, density):
    sources = torch.tensor([0, 3, 9, 40, 80])
    expected = networks.chain_distances([weight.numpy() for weight in chain(density)], sources.numpy(), directed=directed)

    assert_close(path_distances(chain(density), sources, directed=directed), torch.as_tensor(expected), rtol=0, atol=0)


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


@pytest.mark.filterwarnings("ignore:distances between neurons")
def test_paths_through_stacked_cascades():
    """Within 0.08 of the exponents of one layer: a path through more adds the shortest edge at every step."""
    layers = [torch.as_tensor(networks.cascade_weights((1, 2), 3, 5, seed)) for seed in range(2)]
    scaling = path_scaling(layers, generator=generator(), num_sources=200)

    assert_close(scaling.alpha_at(0.0).item(), 0.579, rtol=0, atol=0.08)


def test_neurons_without_ways_are_refused():
    with pytest.raises(ValueError, match="can be reached"):
        path_scaling([torch.zeros(20, 20), torch.zeros(20, 20)], generator=generator())
