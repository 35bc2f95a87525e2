"""The ends of an operator's spectrum, followed over training.

Shape letters:  P size of the operator   k pairs   E further start vectors   L parameters   m products   n images   r
remainders, or added directions
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.operators.estimates import Estimate
from lightning_lowrank.maths.operators.operators import Layout, Operator
from lightning_lowrank.maths.spectra.lanczos import krylov, outside
from lightning_lowrank.maths.spectra.spectrum import (
    eigenvectors,
    full_precision,
    ratio,
    unit_vectors,
    working_dtype,
)

# Of the start vector, beside the old eigenvectors with 1, 1/2, 1/3, ...: measured on small nets, and nearly flat around
# it.
FURTHER = 0.5
# Enough to start from where there is nothing else, too little to cost accuracy.
RANDOM = 1e-3


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenvalues and orthonormal eigenvectors: Ritz pairs of a space, or some of them.

    Attributes:
        values: Rayleigh quotients, signed, largest first.
        vectors: Unit vectors, one a row.
        couplings: `A v - value v` is the couplings times the remainders, which are orthogonal to all vectors.
        remainders: As few as there are; unit vectors, or 0.
        errors: How far each value may be from the eigenvalue of its rank: what its residual leaves open, and what the
            last third of the products moved it by. Nearly always a bound.
        before: The values as they were before the last third of the products.
        earlier: The vectors as they were then; None unless asked for.
        whole: All pairs of the space; None where these are all.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k P"]
    couplings: Float[Tensor, "k r"]
    remainders: Float[Tensor, "r P"]
    errors: Float[Tensor, " k"]
    before: Float[Tensor, " k"]
    earlier: Float[Tensor, "k P"] | None = None
    whole: "Eigenpairs | None" = None

    @cached_property
    def residuals(self) -> Float[Tensor, " k"]:
        """Lengths of `A v - value v`: that near each value there is an eigenvalue of the operator."""
        gram = (self.remainders @ self.remainders.mT).to(self.couplings)
        return (self.couplings @ gram * self.couplings).sum(-1).clamp(min=0).sqrt()

    def images(self) -> Float[Tensor, "k P"]:
        """Products of the operator with the vectors: no new ones are made."""
        along = self.values.to(self.vectors)[:, None] * self.vectors
        return along + self.couplings.to(self.vectors) @ self.remainders

    @property
    def space(self) -> "Eigenpairs":
        """All pairs of the space that these are of: the more is known, the less is left to chance."""
        return self.whole or self


def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    lowest: int = 0,
    start: Float[Tensor, "_ P"] | None = None,
    further: Float[Tensor, "E P"] | None = None,
    num_products: int,
    generator: torch.Generator,
    earlier: bool = False,
) -> Eigenpairs:
    """The `k` largest eigenvalues, largest first, then the `lowest` smallest, smallest last, of the Krylov space of one
    start vector.

    The start vector is a mixture of the old eigenvectors and of other vectors near the top, such as the gradient. If
    little has changed, the mixture lies in the span of the old vectors, and as many products yield the new ones. If
    much has changed, the products go to the directions that are strong now. No decision is needed, so nothing waits for
    the device. Measured against products with each old vector: 5 products instead of 8 for the first value, 10 instead
    of 16 for five.

    An eigenvalue that occurs more than once is found once, unless the space is exhausted before the products are.

    Args:
        start: Eigenvectors found before, most important first; what is not finite is left out.
        further: Other vectors to start from, of any length.
        num_products: How many are made: at least `k + lowest`, unless the operator is smaller. Memory of so many
            vectors.
        generator: On the device of the operator.
        earlier: Give the vectors as they were a third of the products earlier too.
    """
    if num_products < min(k + lowest, operator.size):
        raise ValueError(
            f"{k} largest and {lowest} smallest eigenvalues need at least {k + lowest} products, not {num_products}"
        )
    with full_precision(operator.device):
        random = torch.randn(operator.size, generator=generator, device=operator.device, dtype=operator.dtype)
        found = krylov(
            operator.multiply, _mixture(start, further, random), min(num_products, operator.size), spare=random
        )
        basis, projected = found.basis, found.projected
        fewer = max(min(k + lowest, len(basis)), (2 * len(basis) + 2) // 3)
        before, turn = _ritz(projected[:fewer, :fewer])
        then = _ends(fewer, k, lowest, operator.device)
        older = turn[then].to(basis) @ basis[:fewer] if earlier else None
        last = torch.arange(len(basis), device=operator.device) == len(basis) - 1
        pairs = _pairs(basis, projected, last[:, None].to(basis), found.remainder[None], k, lowest)
        return _since(pairs, before[then], older)


def widened(
    operator: Operator,
    pairs: Eigenpairs,
    seen: Float[Tensor, "n P"],
    *,
    lowest: int = 0,
    num_products: int,
    earlier: bool = False,
) -> Eigenpairs:
    """The same ends of the spectrum in a wider space. It also contains the strongest directions in other images of the
    operator, such as images of random vectors, that are not yet in the space.

    A Krylov space has one start vector. It misses eigenvectors that are hardly in this vector, and all but one of those
    that share an eigenvalue, and nothing in the space shows this. The image of a random vector contains each of them in
    proportion to its eigenvalue.

    Args:
        pairs: What `top_eigenpairs` found.
        seen: The images.
        lowest: How many of the pairs are of the smallest eigenvalues.
        num_products: Directions that the space grows by, one after the other, with a product each.
        earlier: Give the vectors as they were before too.

    References:
        Halko, Martinsson & Tropp (2011), SIAM Review 53(2), Section 4: images of random vectors as a range finder.
    """
    with full_precision(operator.device):
        known, count, basis, images = pairs.space, len(pairs.values) - lowest, pairs.space.vectors, seen[:0]
        for _ in range(min(num_products, operator.size - len(basis))):
            added = _strongest(torch.cat([seen, images]), basis)
            basis, images = torch.cat([basis, added]), torch.cat([images, operator.multiply(added[0])[None]])
        across, size = images @ basis.mT, len(known.values)
        within = torch.cat([known.values.diag().to(across), across[:, :size].mT], 1)
        unit = torch.eye(len(images), dtype=basis.dtype, device=basis.device)
        remainders = torch.cat([outside(known.remainders, basis[size:]), outside(images, basis)])
        couplings = torch.block_diag(known.couplings.to(unit), unit)
        found = _pairs(basis, torch.cat([within, across]), couplings, remainders, count, lowest)
        return _since(found, pairs.before, pairs.vectors if earlier else None)


def sines(pairs: Eigenpairs, k: int) -> Float[Tensor, " k"]:
    """How far each of the first `k` vectors may be from the span of the eigenvectors of the `k` largest eigenvalues:
    the sine of the angle between them, 1 where the pairs do not tell.

    The residual, over the distance of the value from the eigenvalue after the `k` largest, as far as the space knows
    that one. Nearly always a bound.

    References:
        Davis & Kahan (1970), SIAM J. Numerical Analysis 7(1), Section 6.
    """
    known = pairs.space
    largest = known.values + _left_open(known.values, known.residuals)
    after = torch.cat([largest, torch.full_like(largest[:1], torch.inf)])[k]
    found, gaps = known.residuals[:k], (known.values[:k] - after).clamp(min=0)
    return torch.where(found >= gaps, (found > 0).to(found), ratio(found, gaps))


def of_directions(share: Float[Tensor, "*B"], *sines: Float[Tensor, " k"]) -> Estimate:
    """A part of something within the span of approximate eigenvectors, with the error that comes from the directions.
    NaN if it could be anything.

    For a mean over the directions the error is the smaller of two bounds. One is the mean of the sines. The other is
    their rms times the change of so small, or so large, a part by a small angle. For a part of one vector, the error
    assumes that the vector is no nearer to one direction than to another.

    Args:
        share: Between 0 and 1.
        sines: Of the directions; of both spans where there are two.
    """
    mean, rms = sum(s.mean() for s in sines), sum(s.square().mean().sqrt() for s in sines)
    steepness = 2 * (share * (1 - share)).clamp(min=0).sqrt()
    error = torch.minimum(torch.as_tensor(mean).to(share), (rms * (steepness + rms)).to(share))
    return Estimate(torch.where(error >= 1, torch.nan, share), error)


def overlap(now: Float[Tensor, "k P"], before: Float[Tensor, "k P"]) -> Float[Tensor, ""]:
    """Mean squared cosine of the principal angles between the spans of orthonormal rows: 1 for the same, k / P for
    random ones.
    """
    return (now @ before.mT).square().sum() / len(now)


def energy_share(vector: Float[Tensor, " P"], vectors: Float[Tensor, "k P"]) -> Float[Tensor, ""]:
    """Part of a vector's squared length within the span of orthonormal rows; k / P for a random one, 0 for the zero
    vector.
    """
    return (vectors @ unit_vectors(vector)[0]).square().sum()


def rayleigh_quotient(operator: Operator, vector: Float[Tensor, " P"]) -> Float[Tensor, ""]:
    """v^T A v / |v|^2, by one product: of the Hessian with the gradient it is the batch sharpness. NaN for the zero
    vector, which points nowhere.

    References:
        Andreyev & Beneventano (2024), arXiv:2412.20553.
    """
    unit, length = unit_vectors(vector)
    return torch.where(length == 0, torch.nan, unit.dot(operator.multiply(unit)))


def layer_energies(vectors: Float[Tensor, "k P"], layout: Layout) -> Float[Tensor, "k L"]:
    """Part of each unit vector's squared length within each parameter."""
    return layout.sums(vectors.square())


def _ritz(projected: Float[Tensor, "m m"]) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]:
    """Eigenvalues, largest first, and eigenvectors, one a row, of an operator within a space."""
    values, turn = eigenvectors(projected.to(working_dtype(projected.device)))
    return values.flip(0), turn.mT.flip(0)


def _pairs(
    basis: Float[Tensor, "m P"],
    projected: Float[Tensor, "m m"],
    couplings: Float[Tensor, "m r"],
    remainders: Float[Tensor, "r P"],
    k: int,
    lowest: int,
) -> Eigenpairs:
    """The `k` largest Ritz pairs of a space, and the `lowest` smallest.

    Args:
        projected: The operator within the space.
        couplings: What it has outside of the space is these times the remainders.
    """
    values, turn = _ritz((projected + projected.mT) / 2)
    # Their lengths are as large as the operator, and their squares may be beyond what the dtype can tell.
    remainders, lengths = unit_vectors(remainders)
    couplings, nothing = turn @ (couplings.to(turn) * lengths.to(turn)), torch.zeros_like(values)
    whole = Eigenpairs(values, turn.to(basis) @ basis, couplings, remainders, nothing, values)
    open_ = _left_open(values, whole.residuals)
    open_below = _left_open(-values.flip(0), whole.residuals.flip(0)).flip(0)
    kept = _ends(len(values), k, lowest, values.device)
    errors = torch.cat([open_[kept[:k]], open_below[kept[k:]]])
    return Eigenpairs(values[kept], whole.vectors[kept], couplings[kept], remainders, errors, values[kept], None, whole)


def _since(pairs: Eigenpairs, before: Float[Tensor, " k"], earlier: Float[Tensor, "k P"] | None) -> Eigenpairs:
    """With what was known a few products earlier, and how far that was."""
    return replace(pairs, errors=pairs.errors + (pairs.values - before).abs(), before=before, earlier=earlier)


def _left_open(values: Float[Tensor, " m"], residuals: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """How much larger than descending Rayleigh quotients the eigenvalues may be, were what is outside of the space no
    larger than the next of them: the residual where the next is near, its square over the gap where it is not.

    References:
        Kato (1949) and Temple (1928), as in Parlett (1998), The Symmetric Eigenvalue Problem, Section 10.5.
    """
    after = torch.cat([(values + residuals)[1:], values[-1:]])
    gaps = (values - after).clamp(min=0)
    return ratio(2 * residuals.square(), gaps + (gaps.square() + 4 * residuals.square()).sqrt())


def _strongest(vectors: Float[Tensor, "n P"], basis: Float[Tensor, "m P"]) -> Float[Tensor, "1 P"]:
    """The direction outside of the span of orthonormal rows in which vectors have most of their squared length; any,
    where they have nothing.
    """
    left = outside(vectors, basis)
    left = ratio(left, left.abs().max())  # its squares are within the dtype's range
    combination = _ritz(left @ left.mT)[1][:1].to(left)
    found, length = unit_vectors(combination @ left)
    found = torch.where(length[:, None] == 0, basis[-1:].roll(1, -1), found)
    # Of what is rounding more than rounding may lie within the span.
    return unit_vectors(outside(found, basis))[0]


def _ends(found: int, k: int, lowest: int, device: torch.device) -> Tensor:
    """Places of the largest and smallest of descending values; none twice."""
    largest = min(k, found)
    places = torch.arange(found, device=device)
    return torch.cat([places[:largest], places[max(largest, found - lowest) :]])


def _mixture(start: Tensor | None, further: Tensor | None, random: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    mixed: Tensor = RANDOM * unit_vectors(random)[0]
    if start is not None:
        ranks = torch.arange(1, len(start) + 1, device=random.device, dtype=random.dtype)
        mixed = mixed + (_units(start.to(random)) / ranks[:, None]).sum(0)
    if further is not None:
        mixed = mixed + FURTHER * _units(further.to(random)).sum(0)
    return mixed


def _units(vectors: Float[Tensor, "n P"]) -> Float[Tensor, "n P"]:
    """Each over its length; 0 for those that are not finite, or 0 themselves."""
    units, lengths = unit_vectors(vectors)
    return torch.where(torch.isfinite(lengths)[:, None], units, 0.0)
