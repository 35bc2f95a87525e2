"""How many directions each matrix gets, of a budget that all share."""

from collections.abc import Mapping, Sequence
from itertools import groupby


def allocate(
    energies: Mapping[str, Sequence[int | float]],
    costs: Mapping[str, int | float],
    budget: int | float,
    *,
    least: int = 0,
) -> dict[str, int]:
    """Spend a budget on directions, those first that hold the most energy for what they cost.

    The ranks capture the most energy that any ranks of their own cost or less can. A larger budget takes rank from
    nobody, and matrices of equal energies and costs get equal ranks. Up to one direction of the budget, or one of each
    of several equal matrices, is left over.

    Args:
        energies: Of each matrix the squared singular values, largest first.
        costs: Of one direction of it.
        budget: What all directions may cost.
        least: Directions that each matrix with any energy gets first.

    Returns:
        A rank for each matrix, 0 for one without energy.

    Raises:
        ValueError: The budget is too small for the least ranks.

    Examples:
        >>> allocate({"a": [9, 4, 1], "b": [5, 0.1]}, {"a": 10, "b": 10}, 30)
        {'a': 2, 'b': 1}
    """
    ranks = {name: len([energy for energy in several[:least] if energy > 0]) for name, several in energies.items()}
    spent = sum(rank * costs[name] for name, rank in ranks.items())
    if spent > budget:
        raise ValueError(f"a budget of {budget:g} is too small: rank {least} for every matrix needs {spent:g}")
    waiting = sorted(
        (-energy / costs[name], k, name)
        for name, several in energies.items()
        for k, energy in enumerate(several)
        if k >= ranks[name] and energy > 0
    )
    for _, alike in groupby(waiting, key=lambda one: one[:2]):
        names = [name for *_, name in alike]
        spent += sum(costs[name] for name in names)
        if spent > budget:
            break
        ranks |= {name: ranks[name] + 1 for name in names}
    return ranks
