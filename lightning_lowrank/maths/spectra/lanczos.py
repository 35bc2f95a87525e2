"""Krylov recurrences and the Gauss quadrature that they carry: from products with vectors to spectra, on the device,
without waiting for it.

Shape letters:  B any batch axes   N length of a vector   L length on the other side   K steps   V vectors   W
directions of a space   F following directions
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import (
    eigenvalues,
    eigenvectors,
    lengths_of,
    unit_vectors,
    working_dtype,
)

# Lengths below so many rounding units of the largest are taken for 0: the Krylov space is exhausted.
BREAKDOWN = 30
# Part of a spare row that is added to rows which may be zero: below the rounding of any that are not.
FAINT = 1e-30

Multiply = Callable[[Tensor], Tensor]
RoundTrip = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Krylov:
    """A symmetric operator within the Krylov space of a start vector.

    Attributes:
        basis: Orthonormal rows, the start vector first.
        projected: The operator in that basis: tridiagonal.
        remainder: What the operator's product with the last row has outside of the space; other rows' have nothing.
    """

    basis: Num[Tensor, "*B K N"]
    projected: Num[Tensor, "*B K K"]
    remainder: Num[Tensor, "*B N"]


def krylov(
    multiply: Multiply, start: Num[Tensor, "*B N"], steps: int, *, spare: Num[Tensor, "*B N"] | None = None
) -> Krylov:
    """The Krylov space of a start vector, by the Lanczos recurrence.

    Args:
        multiply: Symmetric or Hermitian, `v -> A v` for a batch of vectors.
        start: Any length but zero.
        steps: Products made; no more than N are of use.
        spare: Where the space is exhausted early, the recurrence starts again outside of it with this vector, its
            entries shifted. Without it, what follows is zero and decoupled.

    References:
        Golub & Van Loan (2013), Matrix Computations, Algorithm 10.1.1, with full reorthogonalisation.
    """
    basis = start.new_zeros(*start.shape[:-1], steps, start.shape[-1])
    projected = start.new_zeros(*start.shape[:-1], steps, steps)
    scale = across = torch.zeros_like(lengths_of(start))
    vector, _ = _normalised(start, scale)
    for step in range(steps):
        if step > 0:
            projected[..., step - 1, step] = projected[..., step, step - 1] = across
        basis[..., step, :] = vector
        product = multiply(vector)
        projected[..., step, step] = (product * vector.conj()).sum(-1)
        scale = torch.maximum(scale, lengths_of(product))
        # Both in one reading of the basis.
        rows = [product] if spare is None else [product, spare.roll(step + 1, -1)]
        left = outside(torch.stack(rows, -2), basis[..., : step + 1, :])
        vector, across = _normalised(left[..., 0, :], scale)
        if spare is not None:
            vector = torch.where(across[..., None] == 0, unit_vectors(left[..., 1, :])[0], vector)
    return Krylov(basis, projected, across[..., None] * vector)


def largest_eigenvalue(multiply: Multiply, start: Num[Tensor, "*B N"], steps: int) -> Float[Tensor, "*B"]:
    """The largest eigenvalue of a positive semi-definite operator, from the three-term recurrence alone.

    Without reorthogonalisation values are found again and again, which does not matter for the largest, and a step
    costs a product and little else.

    Args:
        multiply: Symmetric, `v -> A v`; the eigenvectors of the conjugate do as well.
        start: Any length but zero.
        steps: Products made.

    References:
        Paige (1980), Linear Algebra and its Applications 34, on what rounding does to the recurrence.
    """
    previous, across = torch.zeros_like(start), torch.zeros_like(start[..., :1])
    scale = torch.zeros_like(lengths_of(start))
    vector, _ = _normalised(start, scale)
    diagonal, beside = [], []
    for _ in range(steps):
        product = multiply(vector) - across * previous
        along = (product * vector.conj()).sum(-1, keepdim=True)
        scale = torch.maximum(scale, along.abs()[..., 0])
        previous = vector
        vector, length = _normalised(product - along * vector, scale)
        across = length[..., None]
        diagonal.append(along[..., 0])
        beside.append(length)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, -1))
    if steps > 1:
        off = torch.diag_embed(torch.stack(beside[:-1], -1), 1)
        tridiagonal = tridiagonal + off + off.mT
    return eigenvalues(tridiagonal.to(torch.promote_types(tridiagonal.dtype, working_dtype(start.device))))[..., -1]


@dataclass(frozen=True)
class BlockKrylov:
    """`A^T A` within the Krylov space of a block of start vectors.

    Attributes:
        basis: Orthonormal rows, but for rounding in single precision; the span of the start vectors first.
        images: What A makes of each of them.
        following: The next block of the basis, which is in no image; empty where the space is full.
        coupling: What `A^T A` adds to the last block of the basis outside of it, as coordinates along `following`.
    """

    basis: Float[Tensor, "*B W N"]
    images: Float[Tensor, "*B W L"]
    following: Float[Tensor, "*B F N"]
    coupling: Float[Tensor, "*B V F"]


def block_krylov(
    round_trip: RoundTrip, start: Float[Tensor, "*B V N"], steps: int, *, without: Float[Tensor, "*B D N"] | None = None
) -> BlockKrylov:
    """The block Krylov space of `A^T A`, in which the strongest directions of A converge first.

    Where the space is exhausted early, as in a matrix of low rank, directions outside of it follow.

    Args:
        round_trip: `v -> A v, A^T A v` for rows v.
        start: Any rows.
        steps: Round trips made; fewer where the space is full before.
        without: Orthonormal rows, or zeros, that span what is left out.

    References:
        Golub & Underwood (1977), Mathematical Software III, The block Lanczos method, with full reorthogonalisation.
    """
    first = 0 if without is None else without.shape[-2]
    num, size = start.shape[-2:]
    basis = start.new_empty(*start.shape[:-2], first + steps * num, size)
    if without is not None:
        basis[..., :first, :] = without
    filled, images = first, []
    following, coupling = _orthonormal(start, basis[..., :first, :], start)
    for step in range(steps):
        if not following.shape[-2]:
            break
        basis[..., filled : filled + following.shape[-2], :] = following
        filled += following.shape[-2]
        image, back = round_trip(following)
        images.append(image)
        spare = start[..., : back.shape[-2], :].roll(step + 1, -1)
        following, coupling = _orthonormal(back, basis[..., :filled, :], spare)
    return BlockKrylov(basis[..., first:filled, :], torch.cat(images, -2), following, coupling)


def _orthonormal(
    rows: Float[Tensor, "*B V N"], basis: Float[Tensor, "*B W N"], spare: Float[Tensor, "*B V N"]
) -> tuple[Float[Tensor, "*B F N"], Float[Tensor, "*B V F"]]:
    """Orthonormal rows for what given ones have outside of a basis, as many as there is room for; and the given ones'
    coordinates along them.

    The spare rows stand in for rows that are zero.
    """
    rows = rows - (basis @ rows.mT).mT @ basis
    found = rows + FAINT * spare
    # Rows that are rounding, or spare, are outside of the basis only once this is repeated at unit length.
    for _ in range(2):
        found = torch.linalg.qr(found.mT).Q.mT
        found = found - (basis @ found.mT).mT @ basis
    found = torch.linalg.qr(found.mT).Q.mT[..., : max(0, rows.shape[-1] - basis.shape[-2]), :]
    return found, rows @ found.mT


def quadrature(tridiagonal: Num[Tensor, "*B K K"]) -> tuple[Float[Tensor, "*B K"], Float[Tensor, "*B K"]]:
    """Nodes, ascending, and weights, with sum 1, of the Gauss quadrature of the operator's spectral measure at the
    start vector.

    References:
        Golub & Welsch (1969), Mathematics of Computation 23(106).
    """
    nodes, vectors = eigenvectors(tridiagonal)
    return nodes, vectors[..., 0, :].abs().square()


def outside(vectors: Num[Tensor, "*B V N"], basis: Num[Tensor, "*B K N"]) -> Num[Tensor, "*B V N"]:
    """What vectors have outside of the span of orthonormal rows."""
    # Twice is enough: one pass of Gram-Schmidt loses orthogonality in float32.
    for _ in range(2):
        vectors = vectors - (vectors @ basis.mH) @ basis
    return vectors


def _normalised(vector: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vector and length; both 0 where the length is rounding beside `scale`."""
    unit, length = unit_vectors(vector)
    beyond = ~(length <= BREAKDOWN * torch.finfo(vector.dtype).eps * scale)
    return unit * beyond[..., None], length * beyond
