"""Nuclear over spectral norm."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="directions", misleads="One large direction sends it to 1, whatever the others do.")
def nuclear_to_spectral(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Sum of the singular values divided by the largest one.

    Args:
        spectrum: Whole or sketched.

    Returns:
        Between `stable_rank` and `min(M, N)`; 0 for a zero matrix.

    Examples:
        >>> nuclear_to_spectral(svd(torch.diag(torch.tensor([2.0, 1.0]))))
        tensor(1.5000, dtype=torch.float64)

    References:
        The intrinsic dimension of Tropp (2015), arXiv:1501.01571, Definition 7.1.1, of the positive polar factor
        sqrt(A^H A).
    """
    return (spectrum.weights * spectrum.unit).sum(-1)
