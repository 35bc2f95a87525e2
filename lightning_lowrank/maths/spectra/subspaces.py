"""Top singular subspaces of matrices, and the angles between them.

Shape letters:  B any batch axes   M rows, N columns of a matrix   S its short side   K directions kept
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import eigenvectors, full_precision, short_gram, working_dtype


@dataclass(frozen=True)
class Subspace:
    """Top singular vectors of a batch of matrices on their short side, with the singular values.

    Attributes:
        basis: Orthonormal columns, strongest first; left vectors if the matrix is wide or square, right ones if it is
            tall. NaN for a matrix that was not finite.
        values: The singular values, largest first.
    """

    basis: Num[Tensor, "*B S K"]
    values: Float[Tensor, "*B K"]

    @cached_property
    def live(self) -> Bool[Tensor, "*B K"]:
        """Which directions the matrix really has: not those that complete a basis where its rank is below K."""
        noise = self.basis.shape[-2] * torch.finfo(torch.float32).eps
        return self.values > noise * self.values[..., :1]

    @cached_property
    def dimension(self) -> Float[Tensor, "*B"]:
        """How many directions are live."""
        return self.live.sum(-1).to(self.values.dtype)


def top_subspace(matrix: Num[Tensor, "*B M N"], k: int) -> Subspace:
    """The `k` strongest singular directions of the short side, or all if there are fewer.

    It computes all eigenvectors of the Gram matrix, so a batch needs only one call. The cost is three to four times
    that of the values alone.

    Examples:
        >>> top_subspace(torch.diag(torch.tensor([3.0, 4.0])), 1).values
        tensor([4.], dtype=torch.float64)
    """
    with full_precision(matrix.device):
        dtype = working_dtype(matrix.device)
        if min(matrix.shape[-2:]) == 0:
            none = torch.zeros(*matrix.shape[:-2], 1, 1, dtype=dtype, device=matrix.device)
            return Subspace(none, none[..., 0])
        gram, scale = short_gram(matrix, dtype)
        values, vectors = eigenvectors(gram)
        kept = values.flip(-1)[..., :k].clamp(min=0).sqrt() * scale[..., None]
        # Cut out before it is copied: a view of all vectors would keep them.
        return Subspace(vectors[..., -k:].flip(-1), kept)


def top_subspaces(matrices: Sequence[Num[Tensor, "*_ M N"]], k: int) -> Subspace:
    """Those of batches of matrices of one shape as one batch: in one call, or one after the other where that takes too
    much memory.

    NaN for a matrix that even alone cannot be decomposed.
    """
    with suppress(RuntimeError):
        return top_subspace(torch.cat([matrix.reshape(-1, *matrix.shape[-2:]) for matrix in matrices]), k)
    # Not while the error is handled: it holds what did not suffice.
    alone = [_alone(one, k) for matrix in matrices for one in matrix.reshape(-1, *matrix.shape[-2:])]
    return Subspace(torch.stack([s.basis for s in alone]), torch.stack([s.values for s in alone]))


def _alone(matrix: Num[Tensor, "M N"], k: int) -> Subspace:
    with suppress(RuntimeError):
        return top_subspace(matrix, k)
    dtype, kept = working_dtype(matrix.device), max(1, min(k, *matrix.shape))
    values = torch.full((kept,), torch.nan, dtype=dtype, device=matrix.device)
    basis = values.to(torch.promote_types(matrix.dtype, dtype)).expand(max(1, min(matrix.shape)), kept)
    return Subspace(basis, values)


def squared_cosines(one: Subspace, other: Subspace) -> Float[Tensor, "*B"]:
    """Sum of the squared cosines of the principal angles between the live parts of two subspaces: how many directions
    they share.
    """
    products = (one.basis.mH @ other.basis).abs().square()
    return (products * one.live[..., :, None] * other.live[..., None, :]).sum((-2, -1))


def principal_angles(one: Subspace, other: Subspace) -> Float[Tensor, "*B K"]:
    """Principal angles in radians, smallest first; pi / 2 for each direction that either of the two lacks.

    References:
        Bjorck & Golub (1973), Mathematics of Computation 27(123), Theorem 1.
    """
    products = (one.basis * one.live[..., None, :]).mH @ (other.basis * other.live[..., None, :])
    # Cosines from a Gram matrix: an angle below 1e-7 is not told from 0.
    values, _ = eigenvectors(products @ products.mH)
    return values.flip(-1).clamp(0, 1).sqrt().acos()
