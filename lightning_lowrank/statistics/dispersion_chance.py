"""What chance alone makes of the dispersion."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic

DEVIATIONS = 3.5


@statistic(unit="1", comparable=False)
def dispersion_chance(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Dispersion that fewer than one in a hundred networks of identical neurons exceed.

    Masses at one radius are part of those at a larger one, so the covariance of their logarithms is the smaller of the
    two variances. This gives the variance of the dispersion. The dispersion is assumed to follow a chi-squared law, and
    the result lies 3.5 standard deviations above its mean. Independent weights of six shapes from 10 x 128 to 64 x 1024
    exceeded it in 0.1 to 0.6 % of 2000 draws each.

    Args:
        scaling: Of any mode.

    Returns:
        Positive. NaN if there are too few radii.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> dispersion_chance(multifractal_spectrum(weight, direction="in"))
        tensor(0.0172, dtype=torch.float64)

    References:
        Wilson & Hilferty (1931), PNAS 17(12), for quantiles of the chi-squared law.
    """
    noise = scaling.noise_variances
    nested = torch.minimum(noise[..., :, None], noise[..., None, :]).square()
    mean, neurons = scaling.mean_over_radii(noise), scaling.counted.sum(-1)
    variance = 2 * scaling.mean_over_radii(scaling.mean_over_radii(nested)) / (neurons - 1)
    spread = variance / (9 * mean.square())
    return mean * ((1 - spread + DEVIATIONS * spread.sqrt()) ** 3 - 1)
