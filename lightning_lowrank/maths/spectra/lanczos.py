"""Krylov recurrences and the Gauss quadrature that they carry: from products with vectors to spectra, on the device,
without waiting for it.

Shape letters:  B any batch axes   N length of a vector   L length on the other side   K steps   V vectors   W
directions of a trial space
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
    ratio,
    unit_vectors,
    working_dtype,
)

# Lengths below so many rounding units of the largest are taken for 0: the Krylov space is exhausted.
BREAKDOWN = 30

Multiply = Callable[[Tensor], Tensor]
RoundTrip = Callable[[Tensor, Tensor | float], tuple[Tensor, Tensor]]


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


def block_krylov(
    tall: Float[Tensor, "*B L N"], width: int, rounds: int, generator: torch.Generator
) -> tuple[Float[Tensor, "*B N W"], Float[Tensor, "*B L W"]]:
    """Orthonormal basis of a block Krylov space of `A^T A`, in which the strongest directions of A converge first, and
    its image under A.

    Args:
        tall: No fewer rows than columns.
        width: Random start vectors.
        rounds: Blocks past the first; all of them together have at most N directions.
        generator: On the device of the matrix.
    """
    start = torch.randn(*tall.shape[:-1], width, generator=generator, device=tall.device, dtype=tall.dtype)
    space = _orthonormal(tall.mT @ start)
    images = image = tall @ space
    for _ in range(rounds):
        # Reflections complete the basis, orthonormal whatever comes: what a block of a low-rank matrix adds is
        # rounding, in no direction.
        block = _orthonormal(torch.cat([space, tall.mT @ _orthonormal(image)], -1))[..., space.shape[-1] :]
        image = tall @ block
        space, images = torch.cat([space, block], -1), torch.cat([images, image], -1)
    return space, images


def correction(space: Float[Tensor, "*B N W"]) -> Float[Tensor, "*B W W"]:
    """What to multiply columns with that are orthonormal but for rounding, so that they are so in double precision: one
    Newton step.

    Reflections in single precision leave errors of 1e-5 in a thousand equal entries.

    References:
        Bjorck & Bowie (1971), SIAM J. Numerical Analysis 8(2).
    """
    gram = space.double().mT @ space.double()
    return 1.5 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) - 0.5 * gram


def _orthonormal(block: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(block).Q
    return basis


def bidiagonal(round_trip: RoundTrip, start: Float[Tensor, "*B N"], steps: int) -> Float[Tensor, "*B K K+1"]:
    """A rectangular operator between the Krylov spaces of a start vector: an upper bidiagonal matrix with one column
    more than rows.

    Small singular values keep more of their digits than in a recurrence with the Gram matrix.

    Args:
        round_trip: `(v, w) -> u, A^T u` with `u = A v - w`: both products in one reading of A.
        start: On the side of v.
        steps: Pairs of products.

    References:
        Golub & Kahan (1965), SIAM J. Numerical Analysis 2(2), Section 3; one-sided reorthogonalisation as in Simon &
        Zha (2000), SIAM J. Scientific Computing 21(6).
    """
    basis = start.new_zeros(*start.shape[:-1], steps, start.shape[-1])
    wide = start.new_zeros(*start.shape[:-1], steps, steps + 1)
    scale = torch.zeros_like(lengths_of(start))
    right, _ = _normalised(start, scale)
    shift: Tensor | float = 0.0
    for step in range(steps):
        basis[..., step, :] = right
        there, back = round_trip(right, shift)
        scale = torch.maximum(scale, lengths_of(there))
        left, along = _normalised(there, scale)
        back = ratio(back, along[..., None])[..., None, :]
        right, across = _normalised(outside(back, basis[..., : step + 1, :])[..., 0, :], scale)
        shift = across[..., None] * left
        wide[..., step, step], wide[..., step, step + 1] = along, across
    return wide


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
