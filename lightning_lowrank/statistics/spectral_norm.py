"""Spectral norm."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="entries", needs="top", scale_free=False)
def spectral_norm(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Largest singular value: the largest factor by which the matrix stretches a vector. WeightWatcher's
    `spectral_norm` is its square.

    Args:
        spectrum: Whole or sketched.

    Returns:
        Not negative; 0 for a zero matrix.

    Examples:
        >>> spectral_norm(svd(torch.diag(torch.tensor([3.0, 4.0]))))
        tensor(4., dtype=torch.float64)
    """
    return spectrum.top
