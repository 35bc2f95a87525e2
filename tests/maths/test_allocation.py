"""Laws of a budget that is spent on directions, and all allocations of small cases by brute force."""

from itertools import pairwise, product

import numpy as np
import pytest

from lightning_lowrank.maths.allocation import allocate

Energies = dict[str, list[float]]


def case(seed: int, sizes: tuple[int, ...] = (4, 3, 5, 2)) -> tuple[Energies, dict[str, float]]:
    """Spectra and costs of a few matrices."""
    draw = np.random.default_rng(seed)
    names = [f"m{i}" for i in range(len(sizes))]
    energies = {
        name: sorted((draw.exponential(size=size) * draw.exponential()).tolist(), reverse=True)
        for name, size in zip(names, sizes, strict=True)
    }
    return energies, {name: float(draw.integers(1, 9)) for name in names}


def spent(ranks: dict[str, int], costs: dict[str, float]) -> float:
    return sum(rank * costs[name] for name, rank in ranks.items())


def captured(ranks: dict[str, int], energies: Energies) -> float:
    return sum(sum(energies[name][:rank]) for name, rank in ranks.items())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("least", [0, 1])
def test_nothing_of_the_same_cost_captures_more(seed: int, least: int) -> None:
    energies, costs = case(seed)
    every = [
        dict(zip(energies, ranks, strict=True))
        for ranks in product(*(range(least, len(values) + 1) for values in energies.values()))
    ]
    for budget in np.linspace(spent(dict.fromkeys(energies, least), costs), 80, 12):
        ranks = allocate(energies, costs, budget, least=least)
        rivals = [other for other in every if spent(other, costs) <= spent(ranks, costs)]

        assert spent(ranks, costs) <= budget and min(ranks.values()) >= least
        assert captured(ranks, energies) == pytest.approx(max(captured(other, energies) for other in rivals))


def test_at_equal_costs_nothing_within_the_budget_captures_more() -> None:
    energies, _ = case(9)
    costs = dict.fromkeys(energies, 3.0)
    every = [
        dict(zip(energies, ranks, strict=True)) for ranks in product(*(range(len(v) + 1) for v in energies.values()))
    ]
    for budget in range(0, 45, 2):
        best = max(captured(ranks, energies) for ranks in every if spent(ranks, costs) <= budget)

        assert captured(allocate(energies, costs, budget), energies) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(6))
def test_a_larger_budget_takes_rank_from_nobody(seed: int) -> None:
    energies, costs = case(seed)
    found = [allocate(energies, costs, budget) for budget in np.linspace(0, 100, 60)]

    assert all(less[name] <= more[name] for less, more in pairwise(found) for name in energies)
    assert set(found[0].values()) == {0} and found[-1] == {name: len(values) for name, values in energies.items()}


def test_equal_matrices_get_equal_ranks() -> None:
    energies, costs = case(3)
    twice = energies | {f"{name}'": values for name, values in energies.items()}
    both = costs | {f"{name}'": cost for name, cost in costs.items()}

    for budget in range(0, 160, 7):
        ranks = allocate(twice, both, budget)
        assert all(ranks[name] == ranks[f"{name}'"] for name in energies)


def test_units_of_energy_and_cost_change_nothing() -> None:
    energies, costs = case(5)
    scaled = {name: [1e-6 * value for value in values] for name, values in energies.items()}

    assert allocate(energies, costs, 40) == allocate(scaled, {name: 2 * cost for name, cost in costs.items()}, 80)


def test_what_did_not_move_gets_nothing_also_where_all_others_get_the_least() -> None:
    assert allocate({"a": [3, 1], "b": [0, 0]}, {"a": 1, "b": 1}, 100, least=1) == {"a": 2, "b": 0}


def test_a_budget_below_the_least_ranks_is_refused_with_what_they_take() -> None:
    with pytest.raises(ValueError, match=r"a budget of 5 is too small: rank 1 for every matrix needs 6"):
        allocate({"a": [3, 1], "b": [1, 1]}, {"a": 2, "b": 4}, 5, least=1)
