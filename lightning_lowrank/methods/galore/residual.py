"""What a subspace leaves of a gradient, made a step of: Fira's scaling and its norm-growth limiter.

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
    """What the subspace leaves of a gradient, each column scaled as the optimizer has scaled that of the projection.

    Columns are those of a projection of rows, and rows those of a projection of columns; one whose projection is zero
    is left out.

    Args:
        gradient: As it was projected.
        step: What the optimizer made of the projection.
        bases: Of one side.
        ascends: The optimizer maximises.

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
    """A step whose norm is at most `GROWTH` times that of the last one, both over their learning rates; and its norm.

    A step without a norm, as under a rate of zero or of a gradient that is zero or not finite, is none, and the next
    one is compared with the one before it.

    Args:
        step: To be limited.
        rate: Its learning rate.
        last: Norm of the last one; infinite where there is none.

    References:
        Chen et al. (2024), Fira, arXiv:2410.01623.
    """
    norm = torch.linalg.vector_norm(step, dtype=last.dtype) / rate if rate else torch.zeros_like(last)
    counts = norm.isfinite() & (norm > 0)
    kept = norm.minimum(GROWTH * last)
    # Not a product with 0: entries that are not finite would stay so.
    return torch.where(counts, step * ratio(kept, norm).to(step), 0), kept.where(counts, last)
