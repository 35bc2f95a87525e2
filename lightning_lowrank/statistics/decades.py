"""Range of the radii."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="decades", comparable=False)
def decades(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Logarithm to base 10 of the largest over the smallest radius that fits read; in rank mode of the mean mass there.

    Args:
        scaling: Of any mode.

    Returns:
        Below 1 an exponent is no dimension. NaN where there are too few radii.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> decades(multifractal_spectrum(weight, direction="in"))
        tensor(1.4557, dtype=torch.float64)

    References:
        Avnir, Biham, Lidar & Malcai (1998), Science 279(5347), for how few decades most reported fractals span.
    """
    low = torch.where(scaling.fit > 0, scaling.abscissa, torch.inf).amin(-1)
    high = torch.where(scaling.fit > 0, scaling.abscissa, -torch.inf).amax(-1)
    return torch.where(scaling.slope_weights.isnan().any(-1), torch.nan, (high - low) / math.log(10))
