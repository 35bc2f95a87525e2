"""Effective rank of energies."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum, perplexity
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="directions")
def effective_rank_energy(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Exponential of the entropy of the squared singular values divided by their sum.

    Args:
        spectrum: Whole or sketched.

    Returns:
        Between 1 and `min(M, N)`, at least `participation_ratio` and at most `effective_rank`; 0 for a zero matrix.

    Examples:
        >>> effective_rank_energy(svd(torch.eye(3)))
        tensor(3.0000, dtype=torch.float64)

    References:
        Hill (1973), Ecology 54(2), the number of order 1; Roy & Vetterli (2007) with energies in place of singular
        values.
    """
    return perplexity(spectrum.unit.square(), spectrum.weights)
