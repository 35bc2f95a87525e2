"""How unlike the neurons are."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", comparable=False)
def dispersion(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Variance of the logarithm of the mass over neurons, minus that of counting noise, averaged over the radii: how
    much the neurons differ.

    It assumes no power law, so it is also a number if tau is not concave. In rank mode it grows steadily with the
    spread of the rows' scales. Above `dispersion_chance`, it cannot be explained by chance.

    Args:
        scaling: Of any mode.

    Returns:
        About 0 for independent weights. NaN if there are too few radii.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> dispersion(multifractal_spectrum(weight, direction="in"))
        tensor(-0.0028, dtype=torch.float64)

    References:
        This library.
    """
    excess = scaling.variance(scaling.log_masses) - scaling.noise_variances
    return scaling.mean_over_radii(excess)
