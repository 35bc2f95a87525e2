"""Whether there is a spectrum."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False)
def valid(scaling: Scaling) -> Float[Tensor, "*B"]:
    """1 where there is a spectrum: at least five radii, and a tau that is concave, as it is for every measure.
    Otherwise 0.

    If it is 0, all quantities computed from the spectrum are NaN.

    Args:
        scaling: Of any mode.

    Returns:
        0 or 1. It is 0 for constant, zero and ternary matrices. In rank mode it is also 0 for fewer than 32 weights per
        neuron, and if more than half of the weights are 0.

    Examples:
        >>> valid(multifractal_spectrum(torch.ones(64, 64)))
        tensor(0., dtype=torch.float64)

    References:
        This library.
    """
    return scaling.valid.to(scaling.masses)
