"""Width of the spectrum."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False, misleads="A few extreme neurons determine it.")
def width(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Largest minus smallest exponent alpha over the orders q: how far apart the neurons' exponents lie, noise
    included.

    NeuroMFA calls it heterogeneity. A few extreme neurons determine it, and with finitely many weights it is never 0,
    so read it beside `width_floor`. Independent weights reach about this floor on average, and at least three times as
    much in one of a thousand cases.

    Args:
        scaling: Of any mode.

    Returns:
        Not negative. NaN if there is no spectrum: see `valid`.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> width(multifractal_spectrum(weight, direction="in"))
        tensor(0.1801, dtype=torch.float64)

    References:
        Xiao et al. (2025), ICLR, arXiv:2402.09099.
    """
    return scaling.only_valid(scaling.alpha.amax(-1) - scaling.alpha.amin(-1))
