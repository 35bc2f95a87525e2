"""Rank mode: what chance gives, what is seen, what changes nothing, and where there is no number."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lowrank import statistics
from lightning_lowrank.maths.scaling import by_rank
from lightning_lowrank.maths.scaling.by_rank import largest, rank_scaling
from lightning_lowrank.maths.scaling.multifractal import multifractal_spectrum
from lightning_lowrank.maths.scaling.scaling import ORDERS, Scaling
from lightning_lowrank.statistics.registry import REGISTERED, find
from tests import scalings
from tests.oracles import networks
from tests.oracles.spectra import gaussian, generator

NAMES = sorted(name for name, found in REGISTERED.items() if found.takes == (Scaling,))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


# Of the weights of one network each, all independent.
WEIGHTS = {
    "gaussian": gaussian,
    "uniform": uniform,
    "lognormal": lambda *shape, seed=0: (2 * gaussian(*shape, seed=seed)).exp(),
    "student": lambda *shape, seed=0: (
        gaussian(*shape, seed=seed) / gaussian(3, *shape, seed=seed + 1).square().mean(0).sqrt()
    ),
    "cauchy": lambda *shape, seed=0: gaussian(*shape, seed=seed) / gaussian(*shape, seed=seed + 1),
}
every_law = pytest.mark.parametrize("law", WEIGHTS)


def rank_weights():
    """Those of a cascade whose rows and columns are in any order."""
    return torch.as_tensor(networks.cascade_weights((1, 2), 3, 6))


def test_tau_of_a_cascade_is_in_units_of_the_dimension_of_order_two():
    expected = torch.as_tensor(networks.cascade_tau((1, 2), 3, ORDERS) / networks.cascade_tau((1, 2), 3, [1.0]))

    assert_close(rank_scaling(rank_weights()).tau, expected, rtol=0, atol=1e-10)


def test_cascade_of_one_exponent_has_no_width():
    scaling = rank_scaling(torch.as_tensor(networks.cascade_weights((1, 1), 3, 9)))

    assert_close(scaling.alpha, torch.ones(len(ORDERS)).double(), rtol=0, atol=1e-10)


@every_law
def test_dimension_of_order_two_is_one(law):
    scaling = rank_scaling(WEIGHTS[law](4, 64, 128))

    assert_close(scaling.tau_at(1.0), torch.ones(4).double(), rtol=0, atol=1e-9)


@every_law
@pytest.mark.parametrize("shape", [(256, 256), (64, 1024)])
def test_independent_weights_have_one_exponent_but_for_known_noise(law, shape):
    scaling = rank_scaling(WEIGHTS[law](*shape))

    assert_close(scaling.alpha_at(0.0), 1 - scaling.c2_floor / 2, rtol=0, atol=0.01)


@every_law
def test_width_of_independent_weights_is_less_than_twice_its_floor(law):
    """On average; a single one may be more."""
    scaling = rank_scaling(WEIGHTS[law](8, 256, 256))

    assert float(statistics.width(scaling).mean()) < 2 * float(statistics.width_floor(scaling).mean())


@every_law
def test_independent_weights_have_no_excess(law):
    scaling = rank_scaling(WEIGHTS[law](16, 128, 128))
    means = torch.stack([statistics.c2_excess(scaling).mean(), statistics.dispersion(scaling).mean()])

    assert_close(means, torch.zeros(2).double(), rtol=0, atol=0.005)


@pytest.mark.parametrize("quantity", ["c2_excess", "dispersion"])
def test_rows_that_differ_by_five_per_cent_are_seen(quantity):
    """Every one of them, by five standard deviations of what independent weights give."""
    statistic = find(quantity)
    chance, seen = (
        statistic(rank_scaling(gaussian(64, 256, 256))),
        statistic(rank_scaling(scalings.jittered(8, 256, 256, spread=0.05))),
    )

    assert float((seen.mean() - chance.mean()).abs()) >= 5 * float(chance.std())


@pytest.mark.parametrize("shape", [(64, 64), (32, 256), (256, 128)])
def test_alarms_on_independent_weights_are_rare(shape):
    scaling = rank_scaling(gaussian(200, *shape, dtype=torch.float32))
    alarms = statistics.dispersion(scaling) > statistics.dispersion_chance(scaling)

    assert int(alarms.sum()) <= 2


def test_rows_that_differ_by_five_per_cent_are_beyond_chance():
    scaling = rank_scaling(scalings.jittered(20, 256, 256, spread=0.05))

    assert bool((statistics.dispersion(scaling) > statistics.dispersion_chance(scaling)).all())


def test_dispersion_grows_with_the_spread_of_scales():
    found = statistics.dispersion(
        rank_scaling(torch.stack([scalings.jittered(256, 256, spread=s) for s in (0, 0.05, 0.1, 0.25, 0.5, 1)]))
    )

    assert bool((found.diff() > 0).all())


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**30])
def test_scale_changes_nothing(factor):
    weights = scalings.jittered(96, 128, spread=0.1)

    assert_close(rank_scaling(factor * weights).masses, rank_scaling(weights).masses, rtol=0, atol=0)


@pytest.mark.parametrize("monotone", [torch.log1p, torch.sqrt, lambda x: x**3, lambda x: 0.37 * x])
def test_only_the_order_of_magnitudes_matters(monotone):
    # Apart by more than the rounding of float32, in which they are compared.
    magnitudes = (1 + torch.randperm(96 * 128, generator=generator()).view(96, 128)).double() / (96 * 128)

    assert_close(rank_scaling(monotone(magnitudes)).masses, rank_scaling(magnitudes).masses, rtol=0, atol=0)


def test_signs_change_nothing():
    weights = scalings.jittered(96, 128, spread=0.1)

    assert_close(rank_scaling(weights.abs()).masses, rank_scaling(weights).masses, rtol=0, atol=0)


def test_order_of_columns_changes_nothing():
    weights = scalings.jittered(96, 128, spread=0.1)

    assert_close(
        rank_scaling(weights[:, torch.randperm(128, generator=generator())]).masses,
        rank_scaling(weights).masses,
        rtol=0,
        atol=0,
    )


def test_order_of_rows_is_that_of_the_masses():
    weights, order = scalings.jittered(96, 128, spread=0.1), torch.randperm(96, generator=generator())

    assert_close(rank_scaling(weights[order]).masses, rank_scaling(weights).masses[order], rtol=0, atol=0)


def test_transposing_swaps_the_directions():
    weights = scalings.jittered(96, 128, spread=0.1)
    swapped = multifractal_spectrum(weights.mT, direction="in")

    assert_close(multifractal_spectrum(weights, direction="out").masses, swapped.masses, rtol=0, atol=0)


def test_copies_of_all_rows_change_no_exponent():
    weights = scalings.jittered(96, 128, spread=0.1)

    assert_close(rank_scaling(weights.repeat(2, 1)).tau, rank_scaling(weights).tau, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [5, 1000, 3_000_000])
def test_largest_are_those_of_sorting(size):
    values = gaussian(1, size, dtype=torch.float32)
    ranks = torch.linspace(1, size, 24).long()

    assert_close(
        largest(lambda: iter(values.abs().split(2**18, -1)), ranks),
        values.abs().flatten().sort(descending=True).values[ranks - 1],
        rtol=0,
        atol=0,
    )


def test_largest_of_equal_ones():
    values = torch.randint(0, 3, (40, 50), generator=generator()).float()
    ranks = torch.arange(1, 2001)

    assert_close(largest(lambda: iter([values]), ranks), values.flatten().sort(descending=True).values, rtol=0, atol=0)


def test_masses_are_counts():
    weights = scalings.jittered(50, 64, spread=0.2).float()
    scaling = rank_scaling(weights)
    order = weights.abs().flatten().sort(descending=True).values
    shares = torch.logspace(torch.log10(torch.tensor(8 / 64)), torch.log10(torch.tensor(0.5)), 24)
    expected = [1 + (weights.abs() >= order[int(torch.ceil(share * 3200)) - 1]).sum(-1) for share in shares]

    assert_close(scaling.masses, torch.stack(expected, -1).double(), rtol=0, atol=0)


ODD = {
    "constant": torch.ones(64, 64),
    "zero": torch.zeros(64, 64),
    "two levels": 1.0 + (gaussian(64, 64) > 0).double(),
    "ternary": torch.sign(gaussian(64, 64)) * (gaussian(64, 64, seed=1) > 0.5),
    "pruned": gaussian(64, 64) * (gaussian(64, 64, seed=1) > 0.5),
    "fan-out of 31": gaussian(64, 31),
    "not finite": gaussian(64, 64).index_fill(0, torch.tensor([3]), float("inf")),
    "one row": gaussian(1, 64),
    "no rows": gaussian(0, 64),
    "no columns": gaussian(64, 0),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"valid", "kept_share"}))
def test_without_a_scaling_there_is_no_number(name, odd):
    assert bool(find(name)(rank_scaling(ODD[odd])).isnan())


@pytest.mark.parametrize("odd", ODD)
def test_without_a_scaling_nothing_is_valid(odd):
    assert find("valid")(rank_scaling(ODD[odd])) == 0


SPECTRAL = ["alpha0", "asymmetry", "box_dimension", "c2_excess", "correlation_dimension", "width"]


@pytest.mark.parametrize("name", SPECTRAL)
def test_of_neurons_too_different_for_a_spectrum_there_is_no_number(name):
    assert bool(find(name)(rank_scaling(scalings.jittered(256, 256, spread=0.5))).isnan())


def test_rows_of_zeros_do_not_count():
    weights = scalings.jittered(96, 128, spread=0.1)
    with_dead = torch.cat([weights, torch.zeros(40, 128)])

    assert_close(rank_scaling(with_dead).tau, rank_scaling(weights).tau, rtol=0, atol=1e-12)


def test_small_weights_that_are_pruned_do_not_matter():
    """Up to half of them: no radius reaches there."""
    weights = scalings.jittered(96, 128, spread=0.1)
    pruned = torch.where(weights.abs() < weights.abs().quantile(0.4), 0.0, weights)

    assert_close(rank_scaling(pruned).tau, rank_scaling(weights).tau, rtol=0, atol=1e-12)


def test_heads_are_a_batch():
    weights = scalings.jittered(2, 3, 48, 64, spread=0.1)
    expected = torch.stack([torch.stack([rank_scaling(head).tau for head in heads]) for heads in weights])

    assert_close(rank_scaling(weights).tau, expected, rtol=0, atol=1e-12)


def test_some_neurons_stand_for_all():
    weights = scalings.jittered(2000, 128, spread=0.1)
    some = multifractal_spectrum(weights, direction="in", max_neurons=1000, generator=generator())

    assert_close(some.alpha_at(0.0), multifractal_spectrum(weights, direction="in").alpha_at(0.0), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "paths"}, "choose from.*neuromfa"),
        ({"direction": "sideways"}, "choose from.*out"),
        ({"max_neurons": 8}, "give a generator"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        multifractal_spectrum(gaussian(64, 64), **arguments)


def test_rank_mode_takes_one_layer():
    with pytest.raises(ValueError, match="once per layer"):
        multifractal_spectrum([gaussian(64, 64)])


class Allocations(TorchDispatchMode):
    """The most entries of a tensor that is not a view of the one watched."""

    def __init__(self, watched):
        super().__init__()
        self.watched, self.most = watched.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != self.watched:
                self.most = max(self.most, made.numel())
        return result


@pytest.mark.parametrize("transposed", [False, True])
def test_memory_is_bounded_by_a_chunk(transposed):
    weights = gaussian(4096, 1536, dtype=torch.float32)
    with Allocations(weights) as allocations:
        rank_scaling(weights.mT if transposed else weights)

    assert allocations.most <= by_rank.CHUNK
