"""Oracles: networks whose exponents are known in closed form, or are published."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.boxes import box_counting, graph_distances
from lightning_lowrank.maths.scaling.scaling import ORDERS, Scaling
from tests import scalings
from tests.oracles import networks

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.mark.parametrize("cascade", scalings.CASCADES)
def test_tau_of_a_cascade(cascade):
    parts, base, _ = cascade

    assert_close(scalings.cascade(*cascade).tau, torch.as_tensor(networks.cascade_tau(parts, base, ORDERS)), **EXACT)


@pytest.mark.parametrize("cascade", scalings.CASCADES)
def test_alpha_of_a_cascade(cascade):
    parts, base, _ = cascade

    assert_close(
        scalings.cascade(*cascade).alpha, torch.as_tensor(networks.cascade_alpha(parts, base, ORDERS)), **EXACT
    )


def test_f_of_a_cascade():
    q = np.array(ORDERS)
    expected = q * networks.cascade_alpha((1, 2), 3, q) - networks.cascade_tau((1, 2), 3, q)

    assert_close(scalings.cascade((1, 2), 3, 6).f, torch.as_tensor(expected), **EXACT)


def test_dimensions_of_a_cascade():
    """That of order 1 is the entropy of the shares."""
    third, entropy = 1 / 3, np.log(3) - 2 / 3 * np.log(2)
    expected = [np.log(2) / np.log(3), entropy / np.log(3), -np.log(third**2 + (2 * third) ** 2) / np.log(3)]

    assert_close(
        scalings.cascade((1, 2), 3, 6).dimensions[[20, 30, 40]], torch.tensor(expected, dtype=torch.float64), **EXACT
    )


def test_shares_of_own_mass_give_the_same_where_all_reach_the_same():
    cascade = scalings.cascade((1, 2), 3, 6)
    own = Scaling(cascade.masses, cascade.fit, cascade.log_radii, per_node=True)

    assert_close(own.tau, cascade.tau, **EXACT)


def test_tau_of_a_binomial_cover():
    """Boxes of a cover, fewer at larger radii, in place of nodes: the usual tau."""
    masses = torch.zeros(2**8, 9, dtype=torch.float64)
    for k in range(9):
        shares = networks.binomial_masses(0.3, k)
        masses[: len(shares), 8 - k] = torch.as_tensor(shares)
    radii = torch.arange(-8, 1).double() * np.log(2)
    expected = [-np.log2(0.3**q + 0.7**q) for q in ORDERS]

    assert_close(
        Scaling(masses, torch.ones(9).double(), radii).tau, torch.tensor(expected, dtype=torch.float64), **EXACT
    )


@pytest.mark.parametrize("neighbours", [2, 4])
def test_ring_has_one_exponent(neighbours):
    alpha = scalings.hops(1000, networks.ring(1000, neighbours)).alpha

    assert_close(alpha, alpha[:1].expand(len(ORDERS)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("neighbours", [2, 4])
def test_ring_is_a_line(neighbours):
    assert_close(scalings.hops(1000, networks.ring(1000, neighbours)).alpha_at(0.0).item(), 1.0, rtol=0, atol=0.03)


def test_torus_has_one_exponent():
    alpha = scalings.hops(900, networks.torus(30)).alpha

    assert_close(alpha, alpha[:1].expand(len(ORDERS)), **EXACT)


@pytest.mark.parametrize(("rewired", "published"), [(0.01, 1.47), (1.0, 2.83)])
def test_watts_strogatz_networks_as_published(rewired, published):
    """Xiao, Chen and Bogdan (2021); the mean of a few networks, which differ."""
    found = [scalings.hops(1000, networks.watts_strogatz(1000, 4, rewired, seed)).alpha_at(0.0) for seed in range(4)]

    assert_close(torch.stack(found).mean().item(), published, rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("children", "factor", "generations", "tolerance"),
    [(3, 1 / 2, 6, 0.05), (3, 1 / 3, 6, 0.06), (4, 1 / 3, 5, 0.06), (2, 1 / 3, 9, 0.06)],
)
def test_weighted_fractal_trees(children, factor, generations, tolerance):
    """Carletti and Righi (2010): dimension ln children / ln (1 / factor), at the radii of whole subtrees, but for
    single nodes.
    """
    distances = torch.as_tensor(networks.tree_distances(children, factor, generations))
    radii = [2 * factor**k / (1 - factor) for k in range(generations - 1, -1, -1)]

    assert_close(
        -box_counting(distances, radii).tau_at(-1.0).item(), -np.log(children) / np.log(factor), rtol=0, atol=tolerance
    )


def test_flower_is_two_fractals():
    """Furuya and Yakubo (2011): the hubs of the (2, 2)-flower have dimension 1, the rest 2."""
    edges, nodes = networks.flower(6)
    flower = scalings.hops(nodes, edges, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])

    assert_close(
        torch.stack([flower.alpha_at(3.0), -flower.tau_at(-1.0) - 1]), torch.ones(2).double(), rtol=0, atol=0.3
    )


def test_hubs_of_a_flower():
    edges, nodes = networks.flower(6)

    assert_close(
        scalings.hops(nodes, edges, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).alpha_at(3.0).item(), 1.0, rtol=0, atol=0.1
    )


def test_stars_of_one_dimension_have_one_exponent():
    masses, radii = networks.star_masses([1.5] * 8)
    stars = Scaling(torch.as_tensor(masses), torch.ones(len(radii)).double(), torch.as_tensor(np.log(radii)))

    assert_close(stars.alpha, torch.full((len(ORDERS),), 1.5).double(), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("dimensions", "tolerance"), [([1.0, 2.0], 0.02), (1.5 + 0.2 * np.random.default_rng(0).standard_normal(64), 0.1)]
)
def test_stars_of_several_dimensions(dimensions, tolerance):
    """tau is the slope of ln sum_i r ** (q D_i)."""
    masses, radii = networks.star_masses(dimensions)
    stars = Scaling(torch.as_tensor(masses), torch.ones(len(radii)).double(), torch.as_tensor(np.log(radii)))
    x = np.log(radii / radii[-1])
    expected = [np.polyfit(x, np.log(np.exp(q * np.outer(dimensions, x)).sum(0)), 1)[0] for q in ORDERS]

    assert_close(stars.tau, torch.tensor(expected), rtol=0, atol=tolerance)


def test_alpha_is_the_derivative_of_tau():
    step = 1e-4
    scaling = scalings.uneven()
    expected = (scaling.tau_at(1.7 + step) - scaling.tau_at(1.7 - step)) / (2 * step)

    assert_close(scaling.alpha_at(1.7), expected, rtol=0, atol=1e-8)


def test_orders_need_not_be_evenly_spaced():
    cascade = scalings.cascade((1, 2), 3, 6)
    orders = (-2.7, -1.0, 0.0, 0.3, 1.0, 2.9)
    other = Scaling(cascade.masses, cascade.fit, cascade.log_radii, orders=orders)

    assert_close(other.tau, torch.as_tensor(networks.cascade_tau((1, 2), 3, orders)), **EXACT)


def test_copies_of_all_nodes_change_nothing():
    one = scalings.uneven()[2]
    twice = Scaling(one.masses.repeat(2, 1), one.fit, one.log_radii, one.noise)

    assert_close(twice.tau, one.tau, **EXACT)


def test_nodes_of_mass_zero_do_not_count():
    one = scalings.uneven()[2]
    padded = Scaling(torch.nn.functional.pad(one.masses, (0, 0, 0, 9)), one.fit, one.log_radii, one.noise)

    assert_close(torch.stack([padded.tau, padded.alpha]), torch.stack([one.tau, one.alpha]), **EXACT)


def test_radii_that_no_fit_reads_do_not_count():
    cascade = scalings.cascade((1, 2), 3, 6)
    masses, fit = cascade.masses.clone(), cascade.fit.clone()
    masses[:, 3], fit[3] = 0.0, 0.0
    assert cascade.log_radii is not None

    assert_close(Scaling(masses, fit, cascade.log_radii).tau, cascade.tau, **EXACT)


def test_fewer_than_five_radii_are_no_scaling():
    cascade = scalings.cascade((1, 2), 3, 3)

    assert bool(cascade.tau.isnan().all()) and not bool(cascade.valid)


def test_tau_that_is_not_concave_is_no_spectrum():
    """Masses that spread first and come together again."""
    spread = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    masses = torch.exp(torch.linspace(-1, 1, 32).double()[:, None] * spread + torch.arange(6) + 4.0)

    assert not bool(Scaling(masses, torch.ones(6).double(), torch.arange(6).double()).valid)


def test_boxes_of_a_batch_are_those_of_each():
    distances = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.stack([box_counting(one, [0.1, 0.2, 0.4, 0.6, 0.8]).masses for one in distances])

    assert_close(box_counting(distances, [0.1, 0.2, 0.4, 0.6, 0.8]).masses, expected, rtol=0, atol=0)


def test_graph_distances_are_dijkstras():
    draw = np.random.default_rng(0)
    lengths = np.where(draw.random((60, 60)) < 0.1, draw.random((60, 60)), np.inf)
    lengths = np.minimum(lengths, lengths.T)

    assert_close(
        graph_distances(torch.as_tensor(lengths)), torch.as_tensor(networks.dijkstra(lengths)), rtol=1e-14, atol=0
    )
