"""Overlap of subspaces."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import ratio
from lightning_lowrank.maths.spectra.subspaces import Subspace, squared_cosines
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", partner="previous", comparable=False, misleads="Of gradients it is mostly noise of the batch.")
def subspace_overlap(now: Subspace, before: Subspace) -> Float[Tensor, "*B"]:
    """Mean squared cosine of the principal angles between two top singular subspaces.

    Args:
        now: Top directions on the short side of the matrix.
        before: The same for the previous sample.

    Returns:
        Between 0 and 1 (the same subspace); 0 if either belongs to a zero matrix. Compare it with
        `subspace_overlap_chance`.

    Examples:
        >>> from lightning_lowrank.maths.spectra.subspaces import top_subspace
        >>> before = top_subspace(torch.diag(torch.arange(4.0)), 2)
        >>> after = top_subspace(torch.diag(torch.arange(4.0).roll(1)), 2)
        >>> subspace_overlap(before, after)
        tensor(0.5000, dtype=torch.float64)

    References:
        Gur-Ari, Roberts & Dyer (2018), arXiv:1812.04754, for gradients and curvature.
    """
    return ratio(squared_cosines(now, before), now.dimension.minimum(before.dimension))
