"""How many neurons count."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False)
def kept_share(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Share of the neurons that are included: in rank mode those with a nonzero weight, in "neuromfa" those with more
    than 10 edges.

    Args:
        scaling: Of any mode.

    Returns:
        Between 0 and 1. NaN for a matrix that is not finite.

    Examples:
        >>> kept_share(multifractal_spectrum(torch.cat([torch.rand(48, 64), torch.zeros(16, 64)]), direction="in"))
        tensor(0.7500, dtype=torch.float64)

    References:
        This library.
    """
    return torch.where(scaling.lost, torch.nan, scaling.counted.to(scaling.masses).mean(-1))
