"""Effective rank."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum, perplexity
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="directions", misleads="Rounding raises it: in bfloat16 a rank-one matrix of 1024 x 1024 has 1.33.")
def effective_rank(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Exponential of the entropy of the singular values divided by their sum.

    It gives weight to the tail: many tiny values have a large effect, even those that rounding to bfloat16 adds (1.33
    for a rank-one 1024 x 1024 matrix).

    Args:
        spectrum: Whole or sketched.

    Returns:
        Between 1 and `min(M, N)`, at least `effective_rank_energy`; 0 for a zero matrix.

    Examples:
        >>> effective_rank(svd(torch.eye(3)))
        tensor(3.0000, dtype=torch.float64)

    References:
        Roy & Vetterli (2007), EUSIPCO, Section 2.
    """
    return perplexity(spectrum.unit, spectrum.weights)
