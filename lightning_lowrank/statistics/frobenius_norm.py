"""Frobenius norm."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="entries", needs="moments", scale_free=False, comparable=False)
def frobenius_norm(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Root of the sum of squared singular values, which is that of the squared entries. WeightWatcher's `norm` is its
    square.

    Args:
        spectrum: Whole or sketched.

    Returns:
        At least the spectral norm; 0 for a zero matrix.

    Examples:
        >>> frobenius_norm(svd(torch.diag(torch.tensor([3.0, 4.0]))))
        tensor(5., dtype=torch.float64)
    """
    return spectrum.top * spectrum.unit_energies.sum(-1).sqrt()
