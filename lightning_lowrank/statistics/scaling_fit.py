"""Quality of the fits."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False)
def scaling_fit(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Smallest R squared of the lines fitted to ln Z_q, over the orders q with an absolute value of at least 0.5:
    whether masses follow power laws at all.

    Args:
        scaling: Of any mode. For q near 0 the partition function hardly changes, and at q = 0 it is constant.

    Returns:
        At most 1. Below 0.95 the exponents are local slopes of a bent curve. NaN if there are too few radii.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> scaling_fit(multifractal_spectrum(weight, direction="in"))
        tensor(0.9989, dtype=torch.float64)

    References:
        This library.
    """
    far = [i for i, q in enumerate(scaling.orders) if abs(q) >= 0.5]
    return scaling.determination(scaling.log_partition[..., far, :]).amin(-1)
