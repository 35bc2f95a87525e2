"""The ends of an operator's spectrum, followed over training.

Shape letters:  P size of the operator   k pairs   E further start vectors   L parameters
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.operators.operators import Layout, Operator
from lightning_lowrank.maths.spectra.lanczos import krylov
from lightning_lowrank.maths.spectra.spectrum import eigenvectors, full_precision, ratio, working_dtype

# Of the start vector, beside the old eigenvectors with 1, 1/2, 1/3, ...: measured on small nets, and nearly flat around
# it.
FURTHER = 0.5
# Enough to start from where there is nothing else, too little to cost accuracy.
RANDOM = 1e-3


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenvalues and orthonormal eigenvectors.

    Attributes:
        values: Rayleigh quotients, signed.
        vectors: Unit vectors, one a row.
        couplings: `A v - value v` is the coupling times `remainder`, which is orthogonal to all vectors.
        remainder: Unit vector, or 0.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k P"]
    couplings: Float[Tensor, " k"]
    remainder: Float[Tensor, " P"]

    @cached_property
    def residuals(self) -> Float[Tensor, " k"]:
        """Lengths of `A v - value v`: that near each value there is an eigenvalue of the operator."""
        return self.couplings.abs()

    def images(self) -> Float[Tensor, "k P"]:
        """Products of the operator with the vectors: no new ones are made."""
        return (
            self.values.to(self.vectors)[:, None] * self.vectors
            + self.couplings.to(self.vectors)[:, None] * self.remainder
        )


def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    lowest: int = 0,
    start: Float[Tensor, "_ P"] | None = None,
    further: Float[Tensor, "E P"] | None = None,
    num_products: int,
    generator: torch.Generator,
) -> Eigenpairs:
    """The `k` largest eigenvalues, largest first, then the `lowest` smallest, smallest last, of the Krylov space of one
    start vector.

    The start vector is a mixture of the old eigenvectors and of others that are near the top, such as the gradient.
    Where little has changed the mixture lies in the space of the old ones, of which as many products tell the new ones;
    where much has, they are spent on what is strong now. No decision is needed, and so nothing waits for the device.
    Measured against products with each old vector: 5 products instead of 8 for the first value, 10 instead of 16 for
    five.

    An eigenvalue that occurs more than once is found once, unless the space is exhausted before the products are.

    Args:
        start: Eigenvectors found before, most important first; what is not finite is left out.
        further: Other vectors to start from, of any length.
        num_products: How many are made: at least `k + lowest`, unless the operator is smaller. Memory of so many
            vectors.
        generator: On the device of the operator.
    """
    if num_products < min(k + lowest, operator.size):
        raise ValueError(
            f"{k} largest and {lowest} smallest eigenvalues take at least {k + lowest} products, not {num_products}"
        )
    with full_precision(operator.device):
        random = torch.randn(operator.size, generator=generator, device=operator.device, dtype=operator.dtype)
        space = krylov(
            operator.multiply, _mixture(start, further, random), min(num_products, operator.size), spare=random
        )
        values, turn = eigenvectors(space.projected.to(working_dtype(operator.device)))
        kept = _ends(len(values), k, lowest, operator.device)
        length = torch.linalg.vector_norm(space.remainder)
        couplings = turn[-1, kept] * length
        vectors = turn[:, kept].mT.to(operator.dtype) @ space.basis
        return Eigenpairs(values[kept], vectors, couplings, ratio(space.remainder, length))


def overlap(now: Float[Tensor, "k P"], before: Float[Tensor, "k P"]) -> Float[Tensor, ""]:
    """Mean squared cosine of the principal angles between the spans of orthonormal rows: 1 for the same, k / P for
    random ones.
    """
    return (now @ before.mT).square().sum() / len(now)


def energy_share(vector: Float[Tensor, " P"], vectors: Float[Tensor, "k P"]) -> Float[Tensor, ""]:
    """Part of a vector's squared length within the span of orthonormal rows; k / P for a random one, 0 for the zero
    vector.
    """
    length = torch.linalg.vector_norm(vector)
    return (vectors @ ratio(vector, length)).square().sum()


def rayleigh_quotient(operator: Operator, vector: Float[Tensor, " P"]) -> Float[Tensor, ""]:
    """v^T A v / |v|^2, by one product: of the Hessian with the gradient it is the batch sharpness. 0 for the zero
    vector.

    References:
        Andreyev & Beneventano (2024), arXiv:2412.20553.
    """
    unit = ratio(vector, torch.linalg.vector_norm(vector))
    return unit.dot(operator.multiply(unit))


def layer_energies(vectors: Float[Tensor, "k P"], layout: Layout) -> Float[Tensor, "k L"]:
    """Part of each unit vector's squared length within each parameter."""
    return layout.sums(vectors.square())


def _ends(found: int, k: int, lowest: int, device: torch.device) -> Tensor:
    """Places of the largest and smallest of ascending values; none twice."""
    largest = torch.arange(found - 1, max(found - k, 0) - 1, -1, device=device)
    smallest = torch.arange(min(lowest, found - len(largest)) - 1, -1, -1, device=device)
    return torch.cat([largest, smallest])


def _mixture(start: Tensor | None, further: Tensor | None, random: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    mixed: Tensor = RANDOM * random / torch.linalg.vector_norm(random)
    if start is not None:
        ranks = torch.arange(1, len(start) + 1, device=random.device, dtype=random.dtype)
        mixed = mixed + (_units(start.to(random)) / ranks[:, None]).sum(0)
    if further is not None:
        mixed = mixed + FURTHER * _units(further.to(random)).sum(0)
    return mixed


def _units(vectors: Float[Tensor, "n P"]) -> Float[Tensor, "n P"]:
    """Each over its length; 0 for those that are not finite, or 0 themselves."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(torch.isfinite(lengths), ratio(vectors, lengths), 0.0)
