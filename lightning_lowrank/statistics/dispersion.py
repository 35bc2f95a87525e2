"""How unlike the neurons are."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False)
def dispersion(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Variance of the logarithm of the mass over neurons, less that of counting noise, averaged over the radii: how
    unlike they are.

    It needs no power law, so that it is a number also where tau is not concave. In rank mode it grows with the spread
    of the rows' scales all the way. Above `dispersion_chance` it is not chance.

    Args:
        scaling: Of any mode.

    Returns:
        About 0 for independent weights. NaN where there are too few radii.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> dispersion(multifractal_spectrum(weight, direction="in"))
        tensor(-0.0028, dtype=torch.float64)

    References:
        This library.
    """
    excess = scaling.variance(scaling.log_masses) - scaling.noise_variances
    return scaling.mean_over_radii(excess)
