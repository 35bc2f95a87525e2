"""Estimates of the spectra of large matrices, and of the error of what is computed from them.

Shape letters:  B any batch axes   M rows, N columns of a matrix   S its short side   L directions of a trial space   P
probes   K steps or nodes
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_lowrank.maths.spectra.lanczos import bidiagonal, block_krylov, correction, largest_eigenvalue, quadrature
from lightning_lowrank.maths.spectra.spectrum import (
    Spectrum,
    descending,
    eigenvalues,
    eigenvectors,
    full_precision,
    pooled,
    ratio,
    short_gram,
    svd,
    working_dtype,
)

# Products of a block, past the first, in the trial space of `sketch`: blocks of it less one.
ROUNDS = 2
# A direction is taken out where its residual is below this part of its energy: the energy is then off by the square.
CONVERGED = 0.05
# Quadrature weights below this are rounding, and so are their nodes.
FAINT = 1e-12
# Entries of the matrix that a core's cache holds.
CACHED = 2**18
# Energy that float32 products can still tell from 0, as a part of all.
TELLABLE = 1e-5
# Part of a statistic that float32 products may change.
ROUNDING = 1e-3


def sketch(
    matrix: Num[Tensor, "*B M N"], *, generator: torch.Generator, width: int = 25, steps: int = 28, num_probes: int = 8
) -> Spectrum:
    """An estimate of all singular values with O(M N) operations: the strongest directions one by one, the rest by
    stochastic Lanczos quadrature.

    The rest is the mean of Gauss and Gauss-Radau quadrature, which overestimate and underestimate sums of singular
    values. It is reweighted so that the number of values and the energy are exact.

    Args:
        matrix: Best with both sides above 1500; below, `svd` is as fast.
        generator: On the device of the matrix. Do not use the seed with which the matrix itself was drawn: probes that
            repeat its entries are not independent of it, and the error would not show this.
        width: Number of start vectors of the block Krylov space for the strongest directions. Up to twice as many
            directions are taken one by one, but only converged ones.
        steps: Lanczos steps for the rest. `coarse` has half of them and a smaller trial space for the directions.
        num_probes: Independent start vectors.

    References:
        Musco & Musco (2015), NeurIPS, Algorithm 2, for the directions; Ubaru, Chen & Saad (2017), SIAM J. Matrix
        Analysis 38(4), for the quadrature; Golub & Meurant (2010), Matrices, Moments and Quadrature, Theorem 6.4 for
        the bracket.
    """
    shape = (matrix.shape[-2], matrix.shape[-1])
    with full_precision(matrix.device):
        tall, scale = _scaled(matrix if shape[0] >= shape[1] else matrix.mT)
        # Three blocks fill the space of a small matrix.
        width, steps = min(width, -(-min(shape) // (ROUNDS + 1))), min(steps, *shape)
        atoms = _converged(tall, *block_krylov(tall, width, ROUNDS, generator))
        wide = _krylov(tall, atoms.basis, num_probes, steps, generator)
        energy = torch.linalg.vector_norm(tall, dim=-1).double().square().sum(-1)
        fine = _spectrum(atoms.energies, atoms.kept, wide, energy, shape, scale)
        coarse = _spectrum(
            atoms.coarse, atoms.kept, wide[..., : (steps + 1) // 2, : (steps + 1) // 2 + 1], energy, shape, scale
        )
        return replace(fine, coarse=coarse)


def estimate(
    statistic: Callable[[Spectrum], Tensor], spectrum: Spectrum
) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """A statistic of a spectrum and its error: 0 if the spectrum is exact, otherwise a bound that the true error rarely
    exceeds.

    The bound has three terms: three jackknife standard errors over the probes, the difference to the result with half
    of the work, and 1e-3 of the value for rounding. One is added if a statistic counts beyond the directions that were
    computed one by one.

    References:
        Efron & Stein (1981), Annals of Statistics 9(3), equation 1.3.
    """
    value = statistic(spectrum)
    if not spectrum.num_probes:
        return value, torch.zeros_like(value)
    left_out = statistic(leave_one_out(spectrum))
    spread = (spectrum.num_probes - 1) * (left_out - left_out.mean(0)).square().mean(0)
    bias = (value - statistic(spectrum.coarse)).abs() if spectrum.coarse is not None else 0.0
    return value, 3 * spread.sqrt() + bias + counting_error(statistic, spectrum, value) + ROUNDING * value.abs()


def counting_error(
    statistic: Callable[[Spectrum], Tensor], spectrum: Spectrum, value: Float[Tensor, "*B"]
) -> Float[Tensor, "*B"]:
    """One, for a statistic that counts beyond the directions taken out one by one; 0 for one that moves smoothly.

    A `Statistic` knows how far apart its values lie; any other function is taken for continuous.
    """
    step = getattr(statistic, "step", _continuous)(spectrum.shape)
    return step * (value > step * _num_exact(spectrum)).to(value)


def _continuous(shape: tuple[int, int]) -> float:
    return 0.0


def _num_exact(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """How many of the largest values all probes agree on."""
    agreed = ((spectrum.values == spectrum.values[:1]) & (spectrum.weights == 1)).all(0)
    return agreed.to(spectrum.values).cummin(-1).values.sum(-1)


def moments(matrix: Num[Tensor, "*B M N"]) -> Spectrum:
    """One value with a multiplicity that has the energy of the matrix and the sum of its squares: no eigensolver.

    Examples:
        >>> moments(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).energy
        tensor(6.0000, dtype=torch.float64)
    """
    return _from_short_gram(matrix, moments_of_gram)


def top(matrix: Num[Tensor, "*B M N"]) -> Spectrum:
    """The largest singular value, and one more with a multiplicity that completes the energy and the sum of its
    squares: no eigensolver.

    The largest eigenvalue of a float32 Gram matrix by Lanczos from a fixed vector: within 1e-5 of the truth for short
    sides up to 1500.

    Examples:
        >>> top(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).values
        tensor([2.0000, 1.0000], dtype=torch.float64)
    """
    return _from_short_gram(matrix, top_of_gram)


def moments_of_gram(gram: Num[Tensor, "*B S S"]) -> tuple[Float[Tensor, "*B 1"], Float[Tensor, "*B 1"]]:
    """Energy of the node of `moments`, and its multiplicity."""
    first, second = _traces(gram)
    return ratio(second, first)[..., None], ratio(first.square(), second)[..., None]


def top_of_gram(gram: Num[Tensor, "*B S S"]) -> tuple[Float[Tensor, "*B 2"], Float[Tensor, "*B 2"]]:
    """Energies of the nodes of `top`, and their multiplicities."""
    first, second = _traces(gram)
    size = gram.shape[-1]
    fixed = _start(gram).expand(gram.shape[:-1])
    largest = largest_eigenvalue(lambda v: (v[..., None, :] @ gram)[..., 0, :], fixed, _num_steps(size)).to(first)
    left = (first - largest).clamp(min=0)
    other = torch.minimum(ratio((second - largest.square()).clamp(min=0), left), largest)
    return torch.stack([largest, other], -1), torch.stack([torch.ones_like(left), ratio(left, other)], -1)


def _start(gram: Tensor) -> Tensor:
    """A start vector that is always the same: a chirp, with energy spread evenly over places and frequencies."""
    return torch.arange(1, gram.shape[-1] + 1, dtype=torch.float32, device=gram.device).square().sin().to(gram.dtype)


def _num_steps(size: int) -> int:
    """Enough for the largest eigenvalue of a Gaussian matrix, whose neighbours are the closer the larger the matrix."""
    return min(size, 8 * size.bit_length() - 32 if size > 64 else 32)


def _traces(gram: Num[Tensor, "*B S S"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """Trace, and trace of the square."""
    wide = working_dtype(gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1).real.to(wide)
    return trace, torch.linalg.vector_norm(gram, dim=-1).to(wide).square().sum(-1)


def _from_short_gram(matrix: Num[Tensor, "*B M N"], nodes: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Spectrum:
    if min(matrix.shape[-2:]) == 0:
        return replace(svd(matrix), whole=False)
    with full_precision(matrix.device):
        gram, scale = short_gram(matrix, torch.float32)
        energies, weights = nodes(gram)
        values = energies.sqrt() * scale[..., None].to(energies)
    return Spectrum(values, weights, (matrix.shape[-2], matrix.shape[-1]), whole=False)


@dataclass(frozen=True)
class Atoms:
    """Directions that are taken out one by one.

    Attributes:
        basis: Orthonormal columns, 0 where not kept.
        energies: Squared singular values, 0 where not kept.
        coarse: The same from a smaller trial space.
        kept: Which of them have converged.
    """

    basis: Float[Tensor, "*B S K"]
    energies: Float[Tensor, "*B K"]
    coarse: Float[Tensor, "*B K"]
    kept: Float[Tensor, "*B K"]


def _scaled(matrix: Num[Tensor, "*B M N"]) -> tuple[Float[Tensor, "*B M N"], Float[Tensor, "*B"]]:
    """In float32, over its largest entry."""
    matrix = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    largest = torch.maximum(matrix.amax((-2, -1)), -matrix.amin((-2, -1)))
    scale = torch.where(largest > 0, largest, 1.0)
    return (matrix / scale[..., None, None]).float(), scale.double()


def _converged(tall: Float[Tensor, "*B M S"], space: Float[Tensor, "*B S L"], images: Float[Tensor, "*B M L"]) -> Atoms:
    """The strongest directions of a trial space, as many as the smaller one has, those that have converged."""
    mended = correction(space)
    gram = mended @ (images.double().mT @ images.double()) @ mended
    smaller = gram.shape[-1] * ROUNDS // (ROUNDS + 1)
    energies, turn = eigenvectors(gram)
    energies, turn = energies.flip(-1)[..., :smaller].clamp(min=0), (mended @ turn.flip(-1)[..., :smaller]).to(tall)
    coarse = eigenvalues(gram[..., :smaller, :smaller]).flip(-1).clamp(min=0)
    basis = space @ turn
    residual = torch.linalg.vector_norm(tall.mT @ (images @ turn) - basis * energies[..., None, :].to(tall), dim=-2)
    converged = (residual < CONVERGED * energies) & (energies > torch.finfo(torch.float32).eps ** 2 * energies[..., :1])
    # One that has not converged must not be found again, halved, in what is left by weaker ones.
    kept = converged.cummin(-1).values
    return Atoms(basis * kept[..., None, :], energies * kept, coarse * kept, kept.double())


def _krylov(
    tall: Float[Tensor, "*B M S"],
    basis: Float[Tensor, "*B S L"],
    num_probes: int,
    steps: int,
    generator: torch.Generator,
) -> Float[Tensor, "P *B K K+1"]:
    """The matrix without the directions of the basis, within the Krylov spaces of random vectors."""

    def outside(vectors: Tensor) -> Tensor:
        # Twice is enough: what one pass leaves in a strong direction is as large as what a weak rest has.
        for _ in range(2):
            vectors = vectors - (vectors @ basis) @ basis.mT
        return vectors

    def round_trip(vectors: Tensor, shift: Tensor | float) -> tuple[Tensor, Tensor]:
        there, back = _there_and_back(tall, vectors, shift)
        return there, outside(back)

    start = torch.randn(
        *tall.shape[:-2], num_probes, tall.shape[-1], generator=generator, device=tall.device, dtype=tall.dtype
    )
    return bidiagonal(round_trip, outside(start), steps).double().movedim(-3, 0)


def _there_and_back(
    tall: Float[Tensor, "*B M S"], vectors: Float[Tensor, "*B P S"], shift: Tensor | float
) -> tuple[Tensor, Tensor]:
    """`v A^T - shift`, and that times A, by a few rows of A at a time: the second product finds them in the cache of
    the CPU.
    """
    rows = max(1, CACHED // tall.shape[-1]) if tall.device.type == "cpu" else tall.shape[-2]
    there, back = vectors.new_empty(*vectors.shape[:-1], tall.shape[-2]), torch.zeros_like(vectors)
    for first in range(0, tall.shape[-2], rows):
        block, part = tall[..., first : first + rows, :], slice(first, first + rows)
        image = vectors @ block.mT - (shift[..., part] if isinstance(shift, Tensor) else shift)
        there[..., part] = image
        back += image @ block
    return there, back


def _spectrum(
    atoms: Tensor,
    kept: Tensor,
    wide: Float[Tensor, "P *B K K+1"],
    energy: Tensor,
    shape: tuple[int, int],
    scale: Tensor,
) -> Spectrum:
    """Directions one by one and quadrature nodes for the rest, as one spectrum."""
    square = wide[..., :-1]
    pairs = [quadrature(half.mT @ half) for half in (square, wide)]
    nodes, weights = (torch.cat(parts, -1) for parts in zip(*pairs, strict=True))
    nodes = nodes.clamp(min=0) * (weights > FAINT)
    count, rest = min(shape) - kept.sum(-1), (energy - atoms.sum(-1)).clamp(min=0)
    nodes, weights = _matched(nodes, weights / 2, ratio(rest, count) * (rest > TELLABLE * energy))
    weights = weights * count[..., None]
    values = torch.cat([atoms.expand(len(nodes), *atoms.shape), nodes], -1).sqrt() * scale[..., None]
    values, weights = descending(values, torch.cat([kept.expand(len(nodes), *kept.shape), weights], -1))
    return Spectrum(values, weights, shape, whole=False, num_probes=len(nodes))


def _matched(
    nodes: Float[Tensor, "P *B K"], weights: Float[Tensor, "P *B K"], mean: Float[Tensor, "*B"]
) -> tuple[Tensor, Tensor]:
    """Nodes, and weights with sum 1, that have that mean; where the mean is 0 it is not known, and they stay as they
    are.

    The weights are tilted no more than it takes. The nodes are scaled where that does not suffice: in a probe that has
    next to nothing of a direction that carries the rest.
    """
    known = mean[..., None] > 0
    before = (weights * nodes).sum(-1, keepdim=True)
    variance = (weights * (nodes - before).square()).sum(-1, keepdim=True)
    slope = ratio(mean[..., None] - before, variance) * known
    tilted = (weights * (1 + slope * (nodes - before))).clamp(min=0)
    tilted = tilted / tilted.sum(-1, keepdim=True)
    return nodes * torch.where(known, ratio(mean[..., None], (tilted * nodes).sum(-1, keepdim=True)), 1.0), tilted


def leave_one_out(spectrum: Spectrum) -> Spectrum:
    """As a batch in front: the pooled spectrum of all probes but one."""
    parts: list[Spectrum] = [pooled(_without(spectrum, i)) for i in range(spectrum.num_probes)]
    return replace(
        parts[0], values=torch.stack([p.values for p in parts]), weights=torch.stack([p.weights for p in parts])
    )


def _without(spectrum: Spectrum, probe: int) -> Spectrum:
    values, weights = (torch.cat([x[:probe], x[probe + 1 :]]) for x in (spectrum.values, spectrum.weights))
    return replace(spectrum, values=values, weights=weights, num_probes=spectrum.num_probes - 1)
