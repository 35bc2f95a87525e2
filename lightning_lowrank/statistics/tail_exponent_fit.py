"""Quality of the tail exponent's fit."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.statistics.registry import statistic
from lightning_lowrank.statistics.tail_exponent import power_law_fit


@statistic(unit="1", tail=True, reads_shape=True, comparable=False)
def tail_exponent_fit(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Kolmogorov-Smirnov distance between the largest squared singular values and the power law of `tail_exponent`.

    Args:
        spectrum: Must be whole; NaN for a sketch.

    Returns:
        Between 0 and 1, small if a power law describes the tail. NaN if `tail_exponent` is NaN.

    Examples:
        >>> bool(tail_exponent_fit(svd(torch.diag(torch.arange(1.0, 201.0) ** -0.5))) < 0.05)
        True

    References:
        Clauset, Shalizi & Newman (2009), SIAM Review 51(4), equation 3.9.
    """
    return power_law_fit(spectrum)[1]
