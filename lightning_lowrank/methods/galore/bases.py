"""Subspaces for the projection of gradients: computed from a gradient, or random.

Shape letters:  M rows, N columns of a matrix   R its rank in low rank   L, K sides of its projection
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.maths.spectra.spectrum import pooled, ratio

Basis = Literal["subspace", "svd", "random"]

# Columns of the first trial space beyond the rank.
OVERSAMPLING = 8
# Parts of the largest entry below which an entry of a diagonal matrix is rounding, in units of the dtype's epsilon.
ROUNDING = 8


@dataclass(frozen=True)
class Bases:
    """Orthonormal columns on one side of a matrix or on both; None for a side that is not projected.

    Attributes:
        left: Basis of the column space.
        right: Basis of the row space.
    """

    left: Float[Tensor, "M R"] | None
    right: Float[Tensor, "N R"] | None

    def project(self, matrix: Float[Tensor, "M N"]) -> Float[Tensor, "L K"]:
        """Coordinates of a matrix in the subspace."""
        matrix = matrix if self.left is None else self.left.mT @ matrix
        return matrix if self.right is None else matrix @ self.right

    def back(self, low: Float[Tensor, "L K"]) -> Float[Tensor, "M N"]:
        """The matrix that has these coordinates."""
        low = low if self.left is None else self.left @ low
        return low if self.right is None else low @ self.right.mT

    def captured(self, matrix: Float[Tensor, "M N"]) -> Float[Tensor, ""]:
        """Share of a matrix's energy in the subspace, from 0 to 1; NaN for a zero matrix."""
        unit = _scaled(matrix)
        part = self.project(unit).square().sum() / unit.square().sum()
        return part.clamp(max=1)

    def turn(self, old: "Bases") -> "Bases":
        """Coordinates of the old basis vectors in the new basis; they convert old coordinates to new ones.

        Its `project` applies to what was projected with `old`.
        """
        pairs = ((self.left, old.left), (self.right, old.right))
        left, right = (None if new is None or was is None else was.mT @ new for new, was in pairs)
        return Bases(left, right)

    def overlap(self, old: "Bases") -> Float[Tensor, ""]:
        """Mean squared cosine of the principal angles with another subspace, over both sides."""
        return torch.stack([turn.square().sum() / turn.shape[-1] for turn in self.turn(old).sides]).mean()

    @property
    def sides(self) -> list[Tensor]:
        """The bases that exist."""
        return [basis for basis in (self.left, self.right) if basis is not None]

    def to(self, like: Tensor) -> "Bases":
        """A copy with the device and dtype of a tensor."""
        left, right = (None if basis is None else basis.to(like) for basis in (self.left, self.right))
        return Bases(left, right)


@dataclass(frozen=True)
class Projection:
    """How a matrix is projected.

    Attributes:
        rank: At most the short side.
        left: Whether the column space is reduced.
        right: Whether the row space is reduced.
    """

    rank: int
    left: bool
    right: bool

    def shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a projected matrix."""
        return (self.rank if self.left else shape[0], self.rank if self.right else shape[1])

    def num_entries(self, shape: tuple[int, int]) -> int:
        """Number of entries of the bases."""
        return self.rank * sum(size for size, reduced in zip(shape, (self.left, self.right), strict=True) if reduced)

    def chance(self, shape: tuple[int, int]) -> float:
        """Mean share of energy that a random subspace of this size captures."""
        low = self.shape(shape)
        return low[0] * low[1] / (shape[0] * shape[1])

    def overlap_by_chance(self, shape: tuple[int, int]) -> float:
        """Mean overlap of two random subspaces of this size."""
        sides = [size for size, reduced in zip(shape, (self.left, self.right), strict=True) if reduced]
        return sum(self.rank / size for size in sides) / len(sides)

    def best(self, matrix: Float[Tensor, "M N"]) -> Float[Tensor, ""]:
        """Largest share of a matrix's energy that any subspace of this size captures."""
        spectrum = pooled(decompose([matrix], "values").spectra[0])
        energies, weights = spectrum.values.square(), spectrum.weights
        inside = (self.rank - (weights.cumsum(0) - weights)).clamp(min=0)
        return ratio((energies * weights.minimum(inside)).sum(), (energies * weights).sum())

    def made(
        self, kind: Basis, matrix: Float[Tensor, "M N"], old: Bases | None, generator: Callable[[], torch.Generator]
    ) -> Bases:
        """Bases for a matrix, which must be finite and not zero.

        "svd" gives the best subspace. "subspace" makes one step of subspace iteration from the old bases, which keeps
        signs and order of their columns. Without old bases it is a randomised range finder.

        Args:
            kind: Method.
            matrix: The matrix to capture.
            old: The previous bases.
            generator: Generator of random numbers.

        Raises:
            RuntimeError: A decomposition failed.

        References:
            Zhao et al. (2024), arXiv:2403.03507, for "svd"; Halko, Martinsson & Tropp (2011), SIAM Review 53(2),
            Algorithms 4.4 and 5.1, for the range finder.
        """
        working = _scaled(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
        if kind == "random":
            return self._drawn(working, generator())
        if kind == "svd":
            return self._cut(*torch.linalg.svd(working, full_matrices=False))
        if old is None:
            return self._cut(*_range_svd(working, self.rank, generator()))
        before = old.to(working)
        if before.left is None:
            assert before.right is not None
            return Bases(None, _orthonormal(working.mT @ (working @ before.right)))
        left = _orthonormal(working @ (working.mT @ before.left))
        # What is best on the right of a left basis: the rows that it leaves.
        return Bases(left, _orthonormal(working.mT @ left) if self.right else None)

    def _cut(self, left: Tensor, values: Tensor, right: Tensor) -> Bases:
        kept_left, kept_right = left[:, : self.rank].contiguous(), right[: self.rank].mT.contiguous()
        return Bases(kept_left if self.left else None, kept_right if self.right else None)

    def _drawn(self, like: Tensor, generator: torch.Generator) -> Bases:
        draw = partial(torch.randn, generator=generator, dtype=like.dtype, device=like.device)
        left, right = (
            _orthonormal(draw(size, self.rank)) if reduced else None
            for size, reduced in zip(like.shape, (self.left, self.right), strict=True)
        )
        return Bases(left, right)


def without_rounding(low: Float[Tensor, "L K"]) -> Float[Tensor, "L K"]:
    """A two-sided projection without entries that are only rounding errors.

    In bases of its own gradient, the projection is triangular or diagonal. All other entries are rounding errors, which
    an optimizer without moments would enlarge to full steps.
    """
    return low.where(low.abs() >= ROUNDING * torch.finfo(low.dtype).eps * low.abs().max(), 0)


def _range_svd(matrix: Float[Tensor, "M N"], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors by a randomised range finder with one power iteration."""
    width = min(rank + OVERSAMPLING, *matrix.shape)
    trial = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype, device=matrix.device)
    columns = _orthonormal(matrix @ trial)
    columns = _orthonormal(matrix @ (matrix.mT @ columns))
    left, values, right = torch.linalg.svd(columns.mT @ matrix, full_matrices=False)
    return columns @ left, values, right


def _orthonormal(columns: Float[Tensor, "M R"]) -> Float[Tensor, "M R"]:
    """Orthonormal columns of the same span, of which each leans to the side of the one that it is made of."""
    basis, triangle = torch.linalg.qr(columns)
    signed: Tensor = basis * torch.where(triangle.diagonal() < 0, -1, 1).to(basis)
    return signed


def _scaled(matrix: Tensor) -> Tensor:
    """With a largest entry of 1, so that no product under- or overflows."""
    return matrix / matrix.abs().max()
