"""Weight matching: which unit of one network is which unit of the other.

References:
    Ainsworth, Hayase & Srinivasa (2023), "Git Re-Basin", Algorithm 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_lowrank.models.unit_groups import Group

# Change of the outputs, over their largest, up to which two networks compute the same; and sweeps over all groups.
TOLERANCE = 1e-5
SWEEPS = 100
GAIN = 1e-12

State = Mapping[str, Tensor]
Outputs = Callable[[State], Tensor]


@dataclass(frozen=True)
class Matched:
    """B, with its units in the places of those of A that they resemble.

    Attributes:
        state: Weights of B, rearranged.
        used: Groups whose units could change places.
        dropped: Groups that could not: a permutation changed what the network computes.
        deviation: Largest change of an output of B, over the largest output.
        sweeps: Over all groups, until nothing moved.
    """

    state: dict[str, Tensor]
    used: list[str]
    dropped: list[str]
    deviation: float
    sweeps: int


def matched(a: State, b: State, groups: Sequence[Group], outputs: Outputs, *, seed: int = 0) -> Matched:
    """Rearrange the units of B so that its weights resemble those of A, without a change of what B computes.

    Coordinate descent: for one group after the other, in random order, the assignment that maximises the inner product
    of the weights of A and B, all other groups held.

    Cost: per sweep and group an assignment of n units, O(n^3), and their products.

    Args:
        a: Weights by name.
        b: The same of the other network.
        groups: Units that may change places; each is tried on data first, and dropped where it may not.
        outputs: What the network computes on some data, with the weights given.
        seed: Of the order of the groups and of the permutations that are tried.

    Raises:
        ValueError: No group may change places, or the rearranged network computes something else.
    """
    generator = torch.Generator().manual_seed(seed)
    usable = [group for group in groups if group.size > 1 and _harmless(b, group, outputs, generator)]
    dropped = [group.name for group in groups if group.size > 1 and group not in usable]
    if not usable:
        raise ValueError(
            f"no units may change places: each of {dropped} changed what the network computes when they did"
        )
    state = {name: tensor.clone() for name, tensor in b.items()}
    sweeps, moved = 0, True
    while moved and sweeps < SWEEPS:
        moved, sweeps = False, sweeps + 1
        for index in torch.randperm(len(usable), generator=generator).tolist():
            group = usable[index]
            gains = _products(a, state, group)
            order = torch.as_tensor(linear_sum_assignment(gains.numpy(), maximize=True)[1])
            gain = float(gains.gather(1, order[:, None]).sum() - gains.trace())
            if gain > GAIN * float(gains.abs().max()) * group.size:
                group.permute(state, order)
                moved = True
    change = deviation(outputs(b), outputs(state))
    if not change <= TOLERANCE:
        raise ValueError(
            f"the rearranged network computes something else: outputs differ by {change:.1e} of the largest"
        )
    return Matched(state, [group.name for group in usable], dropped, change, sweeps)


def deviation(one: Tensor, other: Tensor) -> float:
    """Largest difference, over the largest magnitude."""
    return float((one - other).abs().max() / one.abs().max().clamp(min=torch.finfo(one.dtype).tiny))


def _products(a: State, b: State, group: Group) -> Tensor:
    """Inner products of every unit of A with every unit of B, over all tensors of the group."""
    products = [group.view(a, bound).double() @ group.view(b, bound).double().T for bound in group.bindings]
    return torch.stack(products).sum(0)


def _harmless(b: State, group: Group, outputs: Outputs, generator: torch.Generator) -> bool:
    """Whether a random permutation leaves what the network computes."""
    state = dict(b)
    group.permute(state, torch.randperm(group.size, generator=generator))
    return deviation(outputs(b), outputs(state)) <= TOLERANCE
