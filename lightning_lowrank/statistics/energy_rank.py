"""Energy rank."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.sketch import TELLABLE
from lightning_lowrank.maths.spectra.spectrum import Spectrum, ratio
from lightning_lowrank.statistics.registry import statistic


@statistic(
    unit="directions", counts=True, parameter="epsilon", domain=(0.0, 0.99), tail=lambda epsilon: epsilon < TELLABLE
)
def energy_rank(spectrum: Spectrum, *, epsilon: float = 0.1) -> Float[Tensor, "*B"]:
    """Smallest number of directions that contain all of the squared Frobenius norm except a share `epsilon`.

    Args:
        spectrum: Whole or sketched. If a value of a sketch stands for several, a part of it may suffice, and the count
            is rounded up.
        epsilon: Share of the energy that may be left out. A tie within 1e-12 counts as enough. Below 1e-3 it is NaN for
            a sketch, whose products in float32 do not tell where so little energy lies.

    Returns:
        An integer between 1 and `min(M, N)`; 0 for a zero matrix. It changes in steps of one, whereas other ranks
        change smoothly.

    Examples:
        >>> energy_rank(svd(torch.diag(torch.tensor([3.0, 1.0, 0.5]))), epsilon=0.1)
        tensor(2., dtype=torch.float64)

    References:
        Jolliffe (2002), Principal Component Analysis, Section 6.1.1: cumulative percentage of total variation, 70 to 90
        %.
    """
    energies = spectrum.unit_energies
    cumulative = energies.cumsum(-1)
    target = (1 - epsilon) * (1 - 1e-12) * cumulative[..., -1:]
    taken = ratio(target - (cumulative - energies), energies).clamp(0, 1)
    # Weights such as a third do not add up to whole numbers.
    return ((spectrum.weights * taken).sum(-1) - 1e-9).clamp(min=0).ceil()
