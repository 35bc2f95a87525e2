"""Position of the spectrum's maximum."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False)
def alpha0(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Position of the maximum of f(alpha): the exponent with which the mean logarithm of the mass grows, the
    information dimension.

    NeuroMFA calls it regularity. In rank mode its unit is the dimension of order 2. Independent weights have 1 plus
    half the size of the floor of `c2_excess`, which is 1.03 with 64 weights per neuron and 1.01 with 1024. In
    "neuromfa" it falls when weights grow.

    Args:
        scaling: Of any mode.

    Returns: NaN if there is no spectrum: see `valid`.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> alpha0(multifractal_spectrum(weight, direction="in"))
        tensor(1.0127, dtype=torch.float64)

    References:
        Xiao et al. (2025), ICLR, arXiv:2402.09099; Hentschel & Procaccia (1983), Physica D 8(3), for the dimension of
        order 1.
    """
    return scaling.only_valid(scaling.alpha_at(0.0))
