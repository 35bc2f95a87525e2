"""Weight matching: which unit of one network corresponds to which unit of the other.

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
    """B with its units permuted to match those of A.

    Attributes:
        state: Permuted weights of B.
        used: Groups of units that were permuted.
        dropped: Groups left out, because a permutation changed what the network computes.
        deviation: Largest change of an output of B, relative to the largest output.
        sweeps: Number of sweeps over all groups until nothing changed.
    """

    state: dict[str, Tensor]
    used: list[str]
    dropped: list[str]
    deviation: float
    sweeps: int


def matched(a: State, b: State, groups: Sequence[Group], outputs: Outputs, *, seed: int = 0) -> Matched:
    """Permute the units of B so that its weights resemble those of A. B computes the same as before.

    This is coordinate descent over the groups, in random order. Each step finds the assignment that maximises the inner
    product of the weights of A and B, with all other groups fixed.

    Cost: for each sweep and group, an assignment of n units, O(n^3), and the products of their weights.

    Args:
        a: Weights by name.
        b: The same of the other network.
        groups: Groups of units to permute. Each is first tested on data, and dropped if a permutation changes the
            outputs.
        outputs: Maps weights to the outputs of the network on some data.
        seed: Seed for the order of the groups and for the tested permutations.

    Raises:
        ValueError: No group can be permuted, or the permuted network computes something else.
    """
    generator = torch.Generator().manual_seed(seed)
    usable = [group for group in groups if group.size > 1 and _harmless(b, group, outputs, generator)]
    dropped = [group.name for group in groups if group.size > 1 and group not in usable]
    if not usable:
        raise ValueError(
            f"no units can be permuted: permuting each group of {dropped} changed the outputs of the network"
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
        raise ValueError(f"the permuted network computes something else: outputs differ by {change:.1e} of the largest")
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
