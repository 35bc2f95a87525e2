"""Inequality against definitions that share no code with it, and planted cases with known answers."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from lightning_lowrank.monitors.concentration.inequality import (
    entropy,
    gini,
    hill_exponent,
    matthew_slope,
    num_largest,
    participation_ratio,
    rank_persistence,
    top_overlap,
    top_overlap_chance,
    top_share,
)

OF_ONE: list[Callable[[Tensor], Tensor]] = [gini, top_share, participation_ratio, entropy, hill_exponent]


def drawn(law: str, *shape: int, seed: int = 0) -> Tensor:
    draws = np.random.default_rng(seed)
    makers = {
        "exponential": lambda: draws.exponential(size=shape),
        "absolute normal": lambda: np.abs(draws.normal(size=shape)),
        "squared normal": lambda: draws.normal(size=shape) ** 2,
        "Pareto": lambda: 1 + draws.pareto(2.5, size=shape),
    }
    return torch.tensor(makers[law]())


def test_gini_is_the_mean_distance_of_two_units_over_twice_their_mean() -> None:
    values = drawn("exponential", 40)

    pairs = [abs(a - b) for a, b in itertools.product(values.tolist(), repeat=2)]
    assert float(gini(values)) == pytest.approx(sum(pairs) / len(pairs) / 2 / float(values.mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("law", "known"),
    [("exponential", 0.5), ("absolute normal", math.sqrt(2) - 1), ("squared normal", 2 / math.pi), ("Pareto", 1 / 4)],
)
def test_gini_of_known_laws(law: str, known: float) -> None:
    assert float(gini(drawn(law, 200_000))) == pytest.approx(known, abs=0.01)


def test_equal_units_and_a_single_winner_are_the_ends() -> None:
    equal, winner = torch.full((50,), 3.0), torch.eye(50)[0]

    assert [float(f(equal)) for f in (gini, top_share, participation_ratio, entropy)] == pytest.approx([0, 0.1, 1, 1])
    assert [float(f(winner)) for f in (gini, top_share, participation_ratio, entropy)] == pytest.approx(
        [0.98, 1, 0.02, 0]
    )


def test_the_top_tenth_is_read_off_the_lorenz_curve_between_units() -> None:
    values = drawn("exponential", 37)

    lorenz = np.concatenate([[0], np.cumsum(np.sort(values.numpy()))]) / float(values.sum())
    assert float(top_share(values)) == pytest.approx(1 - np.interp(0.9 * 37, np.arange(38), lorenz), rel=1e-12)


def test_participation_and_entropy_are_those_of_scipy() -> None:
    values = drawn("exponential", 100).numpy()
    shares = values / values.sum()

    assert float(participation_ratio(torch.tensor(values))) == pytest.approx(1 / np.sum(shares**2) / 100)
    assert float(entropy(torch.tensor(values))) == pytest.approx(stats.entropy(values, base=100))


@pytest.mark.parametrize("exponent", [1.2, 2.5, 5.0])
def test_hill_finds_the_exponent_of_a_pareto_tail(exponent: float) -> None:
    values = torch.tensor(1 + np.random.default_rng(1).pareto(exponent, size=20_000))

    assert float(hill_exponent(values)) == pytest.approx(exponent, rel=0.05)


def test_hill_is_blank_where_its_tenth_is_fewer_than_five_units_or_without_spread() -> None:
    assert hill_exponent(drawn("Pareto", 49)).isnan() and not hill_exponent(drawn("Pareto", 50)).isnan()
    assert hill_exponent(torch.ones(100)).isnan()
    assert hill_exponent(torch.linspace(1, 1 + 1e-6, 100, dtype=torch.float64)).isnan()
    assert hill_exponent(torch.cat([torch.arange(1.0, 6.0), torch.zeros(45)])).isnan()


@pytest.mark.parametrize("statistic", OF_ONE)
@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(60),
        torch.ones(1),
        torch.empty(0),
        torch.tensor([1.0] * 59 + [math.nan]),
        torch.tensor([1.0] * 59 + [math.inf]),
    ],
)
def test_where_there_is_nothing_to_compare_there_is_no_number(
    statistic: Callable[[Tensor], Tensor], values: Tensor
) -> None:
    assert statistic(values).isnan()


@pytest.mark.parametrize("statistic", OF_ONE)
def test_inequality_knows_no_scale_and_batches(statistic: Callable[[Tensor], Tensor]) -> None:
    values = drawn("squared normal", 3, 2, 80)

    rows = torch.stack([statistic(row) for row in values.flatten(0, 1)]).view(3, 2)
    assert_close(statistic(values), rows, rtol=1e-12, atol=0)
    assert_close(statistic(1e-200 * values), rows, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 1.7])
def test_the_matthew_slope_is_the_exponent_of_growth(slope: float) -> None:
    before = drawn("exponential", 500)
    noise = torch.tensor(np.random.default_rng(2).normal(scale=0.3, size=500)).exp()

    found = float(matthew_slope(before, 0.01 * before**slope * noise))

    expected = np.polyfit(np.log(before.numpy()), np.log((0.01 * before**slope * noise).numpy()), 1)[0]
    assert found == pytest.approx(expected, rel=1e-9)
    assert found == pytest.approx(slope, abs=0.05)


def test_units_that_stand_still_are_left_out_of_the_slope() -> None:
    before, growth = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0]), torch.tensor([1.0, 2.0, 4.0, 0.0, 7.0])

    assert float(matthew_slope(before, growth)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("before", "growth"),
    [
        ([1.0, 2.0], [1.0, 2.0]),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]),
        ([1.0, 1.001, 1.002], [1.0, 2.0, 3.0]),
        ([0.0] * 5, [1.0] * 5),
    ],
)
def test_a_slope_needs_three_units_that_differ(before: list[float], growth: list[float]) -> None:
    assert matthew_slope(torch.tensor(before), torch.tensor(growth)).isnan()


def test_noise_has_no_slope_over_disjoint_windows_and_fakes_one_over_shared_ones() -> None:
    """Signals without memory: the sum so far says nothing of what comes, but a sum that holds it does."""
    samples = drawn("exponential", 10, 4000)
    before = samples[:9].sum(0)

    assert abs(float(matthew_slope(before, samples[9]))) < 0.15
    assert float(matthew_slope(before + samples[9], samples[9])) > 0.8


def test_persistence_is_spearmans_correlation_with_ties() -> None:
    first, second = drawn("exponential", 60).round(decimals=1), drawn("exponential", 60, seed=1).round(decimals=1)
    second = second + first

    assert float(rank_persistence(first, second)) == pytest.approx(stats.spearmanr(first, second).statistic, rel=1e-12)
    assert rank_persistence(torch.ones(5), first[:5]).isnan()
    assert rank_persistence(first[:2], second[:2]).isnan()


def test_the_overlap_is_that_of_sets() -> None:
    first, second = drawn("exponential", 30), drawn("exponential", 30, seed=1)

    ours, theirs = (set(np.argsort(-v.numpy())[:6].tolist()) for v in (first, second))
    assert float(top_overlap(first, second)) == pytest.approx(len(ours & theirs) / len(ours | theirs))
    assert num_largest(16, 0.2) == 4 and num_largest(3, 0.2) == 1 and num_largest(30, 0.1) == 3


def test_units_that_have_nothing_are_not_among_the_largest() -> None:
    first, second = torch.eye(30)[3], torch.eye(30)[7]

    assert float(top_overlap(first, second)) == 0
    assert float(top_overlap(first, first)) == 1


def test_two_units_are_the_fewest_that_compare() -> None:
    both, one = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])

    assert [float(f(both)) for f in (gini, top_share, participation_ratio)] == pytest.approx([0.25, 0.15, 0.8])
    assert [float(f(one)) for f in (gini, top_share, participation_ratio, entropy)] == pytest.approx([0.5, 0.2, 0.5, 0])


@pytest.mark.parametrize("statistic", OF_ONE)
def test_what_is_negative_has_no_shares(statistic: Callable[[Tensor], Tensor]) -> None:
    assert statistic(torch.tensor([-1.0] + [1.0] * 59)).isnan()


@pytest.mark.parametrize("wrong", [torch.zeros(30), torch.tensor([1.0] * 29 + [math.nan])])
def test_there_is_no_overlap_of_what_is_not_there(wrong: Tensor) -> None:
    assert top_overlap(drawn("exponential", 30).float(), wrong).isnan()


@pytest.mark.parametrize(("n", "share"), [(6, 0.5), (8, 0.25), (7, 0.9)])
def test_chance_is_the_mean_over_all_sets(n: int, share: float) -> None:
    sets = [set(chosen) for chosen in itertools.combinations(range(n), num_largest(n, share))]

    jaccard = [len(a & b) / len(a | b) for a, b in itertools.product(sets, repeat=2)]
    assert float(top_overlap_chance(n, share)) == pytest.approx(sum(jaccard) / len(jaccard), rel=1e-9)
    assert float(top_overlap_chance(100_000, share)) == pytest.approx(share / (2 - share), rel=1e-3)
