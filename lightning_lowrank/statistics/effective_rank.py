"""Effective rank."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum, perplexity
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="directions")
def effective_rank(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Exponential of the entropy of the singular values over their sum.

    Weighs the tail: many tiny values count for much, also those that rounding to bfloat16 adds (1.33 for a rank-one
    1024 x 1024 matrix).

    Args:
        spectrum: Whole or not.

    Returns:
        Between 1 and `min(M, N)`, at least `effective_rank_energy`; 0 for a zero matrix.

    Examples:
        >>> effective_rank(svd(torch.eye(3)))
        tensor(3.0000, dtype=torch.float64)

    References:
        Roy & Vetterli (2007), EUSIPCO, Section 2.
    """
    return perplexity(spectrum.unit, spectrum.weights)
