"""Curvature of tau beyond chance."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False)
def c2_excess(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Slope of the variance of ln p over the neurons, minus that of counting noise: the curvature of tau at q = 0 that
    is not noise.

    It depends on all neurons, whereas `width` only depends on the extremes. If neurons differ so much that some have
    empty boxes (row scales that vary by more than 30 %), it decreases again; `dispersion` does not.

    Args:
        scaling: Of any mode.

    Returns:
        About 0 for independent weights, negative for neurons that differ. NaN if there is no spectrum: see `valid`.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> c2_excess(multifractal_spectrum(weight, direction="in"))
        tensor(0.0012, dtype=torch.float64)

    References:
        Delour, Muzy & Arneodo (2001), European Physical Journal B 23, for cumulants of the logarithm; this library, for
        the subtracted noise.
    """
    return scaling.only_valid(scaling.c2 - scaling.c2_floor)
