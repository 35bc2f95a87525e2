"""A step for the part of a gradient outside of the subspace: Fira's scaling and its norm-growth limiter.

Shape letters:  M rows, N columns of a matrix   L, K sides of its projection, of which one is that of the matrix
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import ratio
from lightning_lowrank.methods.galore.bases import Bases

# By which the norm may grow from one step to the next: the authors'.
GROWTH = 1.01


def residual_step(
    gradient: Float[Tensor, "M N"], step: Float[Tensor, "L K"], bases: Bases, *, ascends: bool
) -> Float[Tensor, "M N"]:
    """The part of a gradient outside of the subspace, each column scaled as the optimizer scaled that of the
    projection.

    If rows are projected, columns are scaled; if columns are projected, rows are scaled. A column with a zero
    projection is left out.

    Args:
        gradient: The projected gradient.
        step: The optimizer's step of the projection.
        bases: Bases of one side.
        ascends: Whether the optimizer maximises.

    References:
        Chen et al. (2024), Fira, arXiv:2410.01623.
    """
    low = bases.project(gradient)
    side = 1 if bases.left is None else 0
    lengths, own = (
        torch.linalg.vector_norm(x, dim=side, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in (step, low)
    )
    factors = ratio(lengths, own).to(gradient)
    return (gradient - bases.back(low)) * (factors if ascends else -factors)


def limited(step: Float[Tensor, "M N"], rate: float, last: Float[Tensor, ""]) -> tuple[Tensor, Float[Tensor, ""]]:
    """A step whose norm is at most `GROWTH` times that of the last one, each divided by its learning rate; and its
    norm.

    A step has no norm if its rate is zero, or if its gradient is zero or not finite. Such a step is dropped, and the
    next one is compared with the one before it.

    Args:
        step: The step to limit.
        rate: Its learning rate.
        last: Norm of the last one; infinite if there is none.

    References:
        Chen et al. (2024), Fira, arXiv:2410.01623.
    """
    norm = torch.linalg.vector_norm(step, dtype=last.dtype) / rate if rate else torch.zeros_like(last)
    counts = norm.isfinite() & (norm > 0)
    kept = norm.minimum(GROWTH * last)
    # Not a product with 0: entries that are not finite would stay so.
    return torch.where(counts, step * ratio(kept, norm).to(step), 0), kept.where(counts, last)
