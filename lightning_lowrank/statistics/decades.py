"""Range of the radii."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="decades", comparable=False)
def decades(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Base-10 logarithm of the ratio of the largest to the smallest radius used in fits; in rank mode, of the mean mass
    at these radii.

    Args:
        scaling: Of any mode.

    Returns:
        Below 1, an exponent is not a dimension. NaN if there are too few radii.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> decades(multifractal_spectrum(weight, direction="in"))
        tensor(1.4557, dtype=torch.float64)

    References:
        Avnir, Biham, Lidar & Malcai (1998), Science 279(5347), on how few decades most reported fractals span.
    """
    low = torch.where(scaling.fit > 0, scaling.abscissa, torch.inf).amin(-1)
    high = torch.where(scaling.fit > 0, scaling.abscissa, -torch.inf).amax(-1)
    return torch.where(scaling.slope_weights.isnan().any(-1), torch.nan, (high - low) / math.log(10))
