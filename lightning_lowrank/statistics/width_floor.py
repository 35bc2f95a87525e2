"""What chance alone makes of the width."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False)
def width_floor(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Width that identical neurons have because only finitely many weights are counted: the range of q times the
    absolute noise floor of c2.

    Args:
        scaling: Of any mode.

    Returns:
        Not negative. NaN if there are too few radii.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> width_floor(multifractal_spectrum(weight, direction="in"))
        tensor(0.1751, dtype=torch.float64)

    References:
        This library: to first order in the variance of the logarithm of counts.
    """
    return (scaling.orders[-1] - scaling.orders[0]) * scaling.c2_floor.abs()
