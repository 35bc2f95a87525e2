"""Dimension of order 0."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False, misleads="Neurons with the smallest masses dominate it.")
def box_dimension(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Generalised dimension of order 0, `-tau(-1)`: how fast the number of boxes needed to cover the network falls with
    their size.

    Neurons with the smallest masses dominate it.

    Args:
        scaling: Of any mode; in rank mode in units of the dimension of order 2.

    Returns:
        At least `alpha0`. NaN if there is no spectrum: see `valid`.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> box_dimension(multifractal_spectrum(weight, direction="in"))
        tensor(1.0277, dtype=torch.float64)

    References:
        Hentschel & Procaccia (1983), Physica D 8(3), equation 1.11; Tel, Fulop & Vicsek (1989), Physica A 159(2), for
        sums over nodes.
    """
    return scaling.only_valid(-scaling.tau_at(-1.0))
