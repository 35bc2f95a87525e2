"""Dimension of order 2."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False)
def correlation_dimension(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Generalised dimension of order 2, `tau(1)`: the exponent with which the mean mass grows.

    Args:
        scaling: In rank mode the result is 1, because radii are measured by the mean mass itself.

    Returns:
        At most `alpha0`. NaN if there is no spectrum: see `valid`.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> correlation_dimension(multifractal_spectrum(weight)).round(decimals=9)
        tensor(1., dtype=torch.float64)

    References:
        Grassberger & Procaccia (1983), Physica D 9(1-2).
    """
    return scaling.only_valid(scaling.tau_at(1.0))
