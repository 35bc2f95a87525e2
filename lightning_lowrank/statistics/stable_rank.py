"""Stable rank."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="directions", needs="top", misleads="One large direction sends it to 1, whatever the others do.")
def stable_rank(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Squared Frobenius norm divided by squared spectral norm: how many directions are comparable to the strongest one.

    Args:
        spectrum: Whole or sketched. Only the largest value and the energy are used.

    Returns:
        Between 1 and `min(M, N)`; 0 for a zero matrix.

    Examples:
        >>> stable_rank(svd(torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0]))))
        tensor(1.5000, dtype=torch.float64)

    References:
        Rudelson & Vershynin (2007), J. ACM 54(4), Section 1.
    """
    return spectrum.unit_energies.sum(-1)
