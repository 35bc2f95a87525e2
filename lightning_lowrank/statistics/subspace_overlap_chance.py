"""Overlap of random subspaces."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.subspaces import Subspace
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", partner="previous", comparable=False)
def subspace_overlap_chance(now: Subspace, before: Subspace) -> Float[Tensor, "*B"]:
    """Expected `subspace_overlap` of two random subspaces of these dimensions.

    Args:
        now: Top directions on the short side of the matrix.
        before: The same for the previous sample.

    Returns:
        The larger dimension divided by that of the space: `k / min(M, N)` for two subspaces of dimension k. 0 if either
        belongs to a zero matrix.

    Examples:
        >>> from lightning_lowrank.maths.spectra.subspaces import top_subspace
        >>> subspace_overlap_chance(top_subspace(torch.eye(8), 2), top_subspace(torch.eye(8), 2))
        tensor(0.2500, dtype=torch.float64)
    """
    either = now.dimension.maximum(before.dimension) / now.basis.shape[-2]
    return either * (now.dimension > 0) * (before.dimension > 0)
