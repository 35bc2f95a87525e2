"""Krylov recurrences and the Gauss quadrature that they carry: from products with vectors to spectra, on the device, without waiting for it.

Shape letters:  B any batch axes   N length of a vector   L length on the other side   K steps
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.spectrum import eigenvectors, ratio

Operator = Callable[[Float[Tensor, "*B N"]], Tensor]


def lanczos(operator: Operator, start: Float[Tensor, "*B N"], steps: int) -> Float[Tensor, "*B K K"]:
    """The symmetric operator within the Krylov space of a start vector: a tridiagonal matrix.

    Where the space is exhausted early, what follows is zero and decoupled.

    Args:
        operator: Symmetric, `v -> A v` for a batch of vectors.
        start: Any length but zero.
        steps: Products made; no more than N are of use.

    References:
        Golub & Van Loan (2013), Matrix Computations, Algorithm 10.1.1, with full reorthogonalisation.
    """
    vector, _ = _normalised(start, torch.zeros_like(start[..., 0]))
    basis, diagonal, off = [vector], [], []
    scale = torch.zeros_like(start[..., 0])
    for step in range(steps):
        product = operator(basis[-1])
        diagonal.append((product * basis[-1]).sum(-1))
        if step + 1 < steps:
            scale = torch.maximum(scale, _norm(product))
            vector, length = _normalised(_orthogonal(product, basis), scale)
            basis.append(vector)
            off.append(length)
    return _tridiagonal(torch.stack(diagonal, -1), off)


def bidiagonal(forward: Operator, backward: Operator, start: Float[Tensor, "*B N"], steps: int) -> Float[Tensor, "*B K K+1"]:
    """A rectangular operator between the Krylov spaces of a start vector: an upper bidiagonal matrix with one column more than rows.

    Small singular values keep their relative accuracy, which a recurrence with the Gram matrix would lose to rounding.

    Args:
        forward: `v -> A v`.
        backward: `u -> A^T u`.
        start: On the side that `forward` takes.
        steps: Pairs of products.

    References:
        Golub & Kahan (1965), SIAM J. Numerical Analysis 2(2), Section 3; one-sided reorthogonalisation as in Simon & Zha (2000), SIAM J.
        Scientific Computing 21(6).
    """
    scale = torch.zeros_like(start[..., 0])
    right, _ = _normalised(start, scale)
    basis, lengths = [right], []
    left, across = torch.zeros_like(start[..., :1]), scale
    for _ in range(steps):
        product = forward(right) - across[..., None] * left
        scale = torch.maximum(scale, _norm(product))
        left, along = _normalised(product, scale)
        right, across = _normalised(_orthogonal(backward(left), basis), scale)
        basis.append(right)
        lengths.append((along, across))
    along, across = (torch.stack(part, -1) for part in zip(*lengths, strict=True))
    wide = torch.zeros(*along.shape, steps + 1, dtype=along.dtype, device=along.device)
    wide.diagonal(0, -2, -1).copy_(along)
    wide.diagonal(1, -2, -1).copy_(across)
    return wide


def quadrature(tridiagonal: Float[Tensor, "*B K K"]) -> tuple[Float[Tensor, "*B K"], Float[Tensor, "*B K"]]:
    """Nodes, ascending, and weights, with sum 1, of the Gauss quadrature of the operator's spectral measure at the start vector.

    References:
        Golub & Welsch (1969), Mathematics of Computation 23(106).
    """
    nodes, vectors = eigenvectors(tridiagonal)
    return nodes, vectors[..., 0, :].square()


def _norm(vector: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector, dim=-1)


def _normalised(vector: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vector and length; both 0 where the length is rounding beside `scale`."""
    length = _norm(vector)
    length = torch.where(length > 10 * torch.finfo(vector.dtype).eps * scale, length, length * torch.isnan(length))
    return ratio(vector, length[..., None]), length


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """What is left of a vector outside of the span of an orthonormal basis."""
    stacked = torch.stack(basis, -1)
    # Twice is enough: one pass of Gram-Schmidt loses orthogonality in float32.
    for _ in range(2):
        vector = vector - (stacked @ (stacked.mT @ vector[..., None]))[..., 0]
    return vector


def _tridiagonal(diagonal: Tensor, off: list[Tensor]) -> Tensor:
    matrix = torch.diag_embed(diagonal)
    if off:
        beside = torch.stack(off, -1)
        matrix = matrix + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    return matrix
