"""Participation ratio."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum, ratio
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="directions", needs="moments", misleads="Small directions hardly count: read effective_rank beside it.")
def participation_ratio(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Squared sum of the squared singular values, divided by the sum of their fourth powers: the number of equal
    singular values with the same concentration of energy.

    Args:
        spectrum: Whole or sketched. Only the sums of second and fourth powers are used.

    Returns:
        Between 1 and `min(M, N)`, at least `stable_rank` and at most its square; 0 for a zero matrix.

    Examples:
        >>> participation_ratio(svd(torch.diag(torch.tensor([1.0, 1.0, 0.0]))))
        tensor(2., dtype=torch.float64)

    References:
        Bell & Dean (1970), Discussions of the Faraday Society 50; for covariances Gao et al. (2017), bioRxiv 214262.
    """
    energies = spectrum.unit_energies
    return ratio(energies.sum(-1).square(), (energies * spectrum.unit.square()).sum(-1))
