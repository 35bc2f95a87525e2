"""Factors of a weight, `W = A diag(s) B`: their initial values, and the change of the product in one step.

Shape letters:  M rows, N columns of a weight   R rank
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import working_dtype

Init = Literal["svd", "spectral"]


class Factors(NamedTuple):
    """Factors of one weight as a matrix.

    Attributes:
        left: A; its columns are orthonormal at the start.
        scale: s; the singular values at the start.
        right: B; its rows are orthonormal at the start.
    """

    left: Num[Tensor, "M R"]
    scale: Num[Tensor, " R"]
    right: Num[Tensor, "R N"]

    def product(self) -> Tensor:  # compilers trace it
        """The weight."""
        return self.left @ (self.scale[:, None] * self.right)

    def copied(self) -> "Factors":
        """A copy of the current factors."""
        return Factors(*(wide(t).clone() for t in self))


def wide(tensor: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A tensor for computing, in float64 if the device has it."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, working_dtype(tensor.device)))


@torch.no_grad()
def factorized(matrix: Num[Tensor, "M N"], rank: int, init: Init, generator: torch.Generator) -> Factors:
    """The initial factors of a weight.

    Args:
        matrix: The weight.
        rank: Rank of the product.
        init: "svd": the best approximation of that rank. "spectral": random orthonormal factors with the same singular
            values.
        generator: Generator of random factors.
    """
    u, s, vt = torch.linalg.svd(wide(matrix), full_matrices=False)
    left, right = u[:, :rank], vt[:rank]
    if init == "spectral":
        left, right = _orthonormal(left, generator), _orthonormal(right.mT, generator).mT
    return Factors(*(t.to(matrix).contiguous() for t in (left, s[:rank], right)))


def energy_rank(matrix: Num[Tensor, "M N"], share: float) -> int:
    """Number of directions that contain a share of the squared Frobenius norm; 1 for a zero matrix."""
    energy = torch.linalg.svdvals(wide(matrix)).square()
    return min(int((energy.cumsum(0) < share * energy.sum()).sum()) + 1, len(energy))


def orthogonality_gap(left: Num[Tensor, "M R"]) -> Float[Tensor, ""]:
    """Spectral norm of A'A - I: 0 for orthonormal columns, 1 for a zero matrix."""
    values = torch.linalg.svdvals(wide(left))
    error: Tensor = (values.square() - 1).abs().amax()
    return error


def change_norm(before: Factors, after: Factors) -> Float[Tensor, ""]:
    """Spectral norm of the change of the product, from a core of 2 R x 2 R; the product is never formed.

    `A S B` changes by `dA S B + A d(S B)`, with the second factors after the step and the first before it. This avoids
    a difference of nearly equal products.
    """
    first, second = (Factors(*map(wide, factors)) for factors in (before, after))
    rows, rows_before = (f.scale[:, None] * f.right for f in (second, first))
    left = torch.cat([second.left - first.left, first.left], 1)
    right = torch.cat([rows, rows - rows_before])
    norm: Tensor = torch.linalg.matrix_norm(_triangle(left) @ _triangle(right.mT).mT, 2)
    return norm


def product_spectrum(factors: Factors) -> Float[Tensor, " R"]:
    """Singular values of the product, from a core of R x R."""
    left, scale, right = map(wide, factors)
    values: Tensor = torch.linalg.svdvals((_triangle(left) * scale) @ _triangle(right.mT).mT)
    return values


def _triangle(tall: Float[Tensor, "M R"]) -> Float[Tensor, "S R"]:
    triangle: Tensor = torch.linalg.qr(tall, mode="r")[1]
    return triangle


def _orthonormal(like: Float[Tensor, "M R"], generator: torch.Generator) -> Float[Tensor, "M R"]:
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis
