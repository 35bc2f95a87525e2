"""Estimates of the spectra of large matrices, and of the error of what is computed from them.

Shape letters:  B any batch axes   M rows, N columns of a matrix   S its short side, L its long side   W directions of a
space   V the first of them   P probes   K directions or nodes
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_lowrank.maths.spectra.lanczos import BREAKDOWN, BlockKrylov, block_krylov, largest_eigenvalue
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
    unit_vectors,
    working_dtype,
)

# Blocks of the Krylov space for the strongest directions. Its smaller space has one less.
BLOCKS = 6
# A direction is taken out where its residual is below this part of its energy: the energy is then off by the square.
CONVERGED = 0.02
# Quadrature weights below this are rounding, and so are their nodes.
FAINT = 1e-12
# Entries of the matrix that a core's cache holds.
CACHED = 2**17
# Energies of matrices of which float32 holds all products.
SAFE = (1e-12, 1e24)
# Energy of the rest as a part of all, below which its quadrature knows it better than a difference of float32 products.
TELLABLE = 1e-3
# Part of a statistic that float32 products may change.
ROUNDING = 1e-3


def sketch(
    matrix: Num[Tensor, "*B M N"], *, generator: torch.Generator, width: int = 16, steps: int = 14, num_probes: int = 16
) -> Spectrum:
    """An estimate of all singular values with O(M N) operations: the strongest directions one by one, the rest by
    stochastic quadrature in a block Krylov space.

    The rest is the mean of Gauss and Gauss-Radau quadrature, which overestimate and underestimate sums of singular
    values. It is reweighted so that the number of values is exact, and the energy too where the rest has at least a
    thousandth of it.

    Args:
        matrix: Best with both sides above 1500; below, `svd` is as fast.
        generator: On the device of the matrix. Do not use the seed with which the matrix itself was drawn: probes that
            repeat its entries are not independent of it, and the error would not show this.
        width: Number of start vectors of the block Krylov space for the strongest directions. Up to five times as many
            directions are taken one by one, but only converged ones.
        steps: Blocks of the Krylov space for the rest. `coarse` has half of them, and one block less for the
            directions.
        num_probes: Independent start vectors of that space.

    Returns:
        Values that all probes share, and the weights of each; with `coarse`, from which `estimate` has its error. All 0
        for a zero matrix, NaN for one that is not finite. Without the smallest values: `whole` is False.

    Cost: 20 readings of the matrix, each for 16 products with A and with its transpose: about 1,300 M N flops. Memory
        of 560 vectors, and of a copy in float32. On CPU, a matrix in float32 that is not wide needs no copy.

    References:
        Musco & Musco (2015), NeurIPS, Algorithm 2, for the directions; Ubaru, Chen & Saad (2017), SIAM J. Matrix
        Analysis 38(4), for the quadrature; Golub & Meurant (2010), Matrices, Moments and Quadrature, Theorem 6.4 for
        the bracket, which is proven for single vectors and holds for blocks in all our tests.
    """
    shape = (matrix.shape[-2], matrix.shape[-1])
    with full_precision(matrix.device):
        tall, scale, energy = _scaled(matrix)

        def draw(num: int) -> Tensor:
            size = (*tall.shape[:-2], num, tall.shape[-1])
            return torch.randn(size, generator=generator, device=tall.device, dtype=tall.dtype)

        def round_trip(vectors: Tensor) -> tuple[Tensor, Tensor]:
            return _there_and_back(tall, vectors)

        # At most half of the space of a small matrix: the rest needs room.
        atoms = _converged(block_krylov(round_trip, draw(max(1, min(width, min(shape) // (2 * BLOCKS)))), BLOCKS))
        probes = draw(num_probes)
        rest = block_krylov(round_trip, probes, steps, without=atoms.basis)
        images = torch.cat([rest.images, rest.following @ tall.mT], -2).double()
        gram = images @ images.mT
        starts = unit_vectors((probes @ rest.basis[..., :num_probes, :].mT).double())[0]
        floor = (BREAKDOWN * torch.finfo(tall.dtype).eps) ** 2 * energy
        # Also of the coarse one: the directions that are left out are the same.
        left = (energy - atoms.energies.sum(-1)).clamp(min=0)
        left = left * (left > TELLABLE * energy)

        def spectrum(strongest: Tensor, size: int) -> Spectrum:
            inner = gram[..., : size + num_probes, : size + num_probes]
            return _spectrum(strongest, atoms.kept, _nodes(inner, starts, size, floor), left, shape, scale)

        whole = rest.basis.shape[-2]
        coarse = spectrum(atoms.coarse, min(-(-steps // 2) * num_probes, whole))
        return replace(spectrum(atoms.energies, whole), coarse=coarse)


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
        basis: Orthonormal rows, 0 where not kept.
        energies: Squared singular values, 0 where not kept.
        coarse: The same from a smaller trial space.
        kept: Which of them have converged.
    """

    basis: Float[Tensor, "*B K S"]
    energies: Float[Tensor, "*B K"]
    coarse: Float[Tensor, "*B K"]
    kept: Float[Tensor, "*B K"]


def _scaled(
    matrix: Num[Tensor, "*B M N"],
) -> tuple[Float[Tensor, "*B L S"], Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """With no fewer rows than columns, in float32, and over its largest entry unless a matrix on CPU needs neither.

    Beside it, that scale, and the energy.
    """
    plain = matrix.device.type == "cpu" and matrix.dtype == torch.float32
    energy = _energy(matrix) if plain else None
    if energy is not None and ((energy > SAFE[0]) & (energy < SAFE[1])).all():
        scale = torch.ones_like(energy)
    else:
        matrix = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
        largest = torch.maximum(matrix.amax((-2, -1)), -matrix.amin((-2, -1)))
        scale = torch.where(largest > 0, largest, 1.0)
        matrix = (matrix / scale[..., None, None]).float()
        scale, energy = scale.double(), _energy(matrix)
    return (matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT).contiguous(), scale, energy


def _energy(matrix: Float[Tensor, "*B M N"]) -> Float[Tensor, "*B"]:
    # The length of all entries at once takes three times as long.
    lengths: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return lengths.double().square().sum(-1)


def _converged(space: BlockKrylov) -> Atoms:
    """The strongest directions of a space, as many as the smaller one has, those that have converged."""
    images = space.images.double()
    gram = images @ images.mT
    smaller = gram.shape[-1] * (BLOCKS - 1) // BLOCKS
    energies, turn = eigenvectors(gram)
    energies, turn = energies.flip(-1)[..., :smaller].clamp(min=0), turn.flip(-1)[..., :smaller].mT
    coarse = eigenvalues(gram[..., :smaller, :smaller]).flip(-1).clamp(min=0)
    last = space.coupling.shape[-2]
    residual = torch.linalg.vector_norm(turn[..., -last:] @ space.coupling.double(), dim=-1)
    converged = (residual < CONVERGED * energies) & (energies > torch.finfo(torch.float32).eps ** 2 * energies[..., :1])
    # One that has not converged must not be found again, halved, in what is left by weaker ones.
    kept = converged.cummin(-1).values
    basis = turn.to(space.basis) @ space.basis
    return Atoms(basis * kept[..., None], energies * kept, coarse * kept, kept.double())


def _there_and_back(
    tall: Float[Tensor, "*B M S"], vectors: Float[Tensor, "*B P S"]
) -> tuple[Float[Tensor, "*B P M"], Float[Tensor, "*B P S"]]:
    """`v A^T`, and that times A. On CPU by a few rows of A at a time: the second product finds them in the cache.

    MKL is fastest with multiples of 16 vectors, as contiguous columns.
    """
    if tall.device.type != "cpu":
        there = vectors @ tall.mT
        return there, there @ tall
    if tall.ndim > 2:
        pairs = [_there_and_back(one, v) for one, v in zip(tall.flatten(0, -3), vectors.flatten(0, -3), strict=True)]
        there, back = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return there.reshape(*vectors.shape[:-1], -1), back.reshape(vectors.shape)
    columns = vectors.mT.contiguous()
    there, back = columns.new_empty(tall.shape[-2], columns.shape[-1]), columns.new_zeros(columns.mT.shape)
    rows = max(1, CACHED // max(1, tall.shape[-1]))
    for block, image in zip(tall.split(rows), there.split(rows), strict=True):
        torch.mm(block, columns, out=image)
        back.addmm_(image.mT, block)
    return there.mT, back


def _nodes(
    gram: Float[Tensor, "*B W W"], starts: Float[Tensor, "*B P V"], size: int, floor: Float[Tensor, "*B"]
) -> tuple[Float[Tensor, "*B K"], Float[Tensor, "P *B K"]]:
    """Nodes of Gauss and Gauss-Radau quadrature in one, and the weights of each probe.

    Args:
        gram: Of the images of the basis, and of the block that follows it.
        starts: Probes as coordinates along the first rows of the basis.
        size: Rows of the basis.
        floor: Energies up to this are rounding.
    """
    inner, turn = eigenvectors(gram[..., :size, :size])
    inner = inner.clamp(min=0)
    told = inner > floor[..., None]
    across = (turn.mT @ gram[..., :size, size:]) * told[..., None]
    # With the smallest corner, the operator has as many zeros as the block that follows has rows: Radau's fixed nodes.
    corner = across.mT @ ratio(across, (inner * told)[..., None])
    rows = torch.cat([inner.diag_embed(), across], -1), torch.cat([across.mT, corner], -1)
    outer, mixed = eigenvectors(torch.cat(rows, -2))
    first = starts @ turn[..., : starts.shape[-1], :]
    weights = torch.cat([first, first @ mixed[..., :size, :]], -1).square().movedim(-2, 0) / 2
    return torch.cat([inner, outer.clamp(min=0)], -1) * (weights > FAINT).any(0), weights


def _spectrum(
    atoms: Tensor,
    kept: Tensor,
    rest: tuple[Float[Tensor, "*B K"], Float[Tensor, "P *B K"]],
    left: Tensor,
    shape: tuple[int, int],
    scale: Tensor,
) -> Spectrum:
    """Directions one by one and quadrature nodes for the rest, as one spectrum."""
    nodes, weights = rest
    count = min(shape) - kept.sum(-1)
    weights = _matched(nodes, weights, ratio(left, count)) * count[..., None]
    values = torch.cat([atoms, nodes], -1).sqrt() * scale[..., None]
    values, weights = descending(values, torch.cat([kept.expand(len(weights), *kept.shape), weights], -1))
    return Spectrum(values[None], weights, shape, whole=False, num_probes=len(weights))


def _matched(
    nodes: Float[Tensor, "*B K"], weights: Float[Tensor, "P *B K"], mean: Float[Tensor, "*B"]
) -> Float[Tensor, "P *B K"]:
    """Weights with sum 1 that have that mean; where the mean is 0 it is not known, and they stay as they are.

    The weights are tilted no more than it takes. Where that does not suffice, the largest or smallest node gets some
    more: for a probe that has next to nothing of a direction that carries the rest.
    """
    known = mean[..., None] > 0
    before = (weights * nodes).sum(-1, keepdim=True)
    variance = (weights * (nodes - before).square()).sum(-1, keepdim=True)
    slope = ratio(mean[..., None] - before, variance) * known
    tilted = (weights * (1 + slope * (nodes - before))).clamp(min=0)
    tilted = tilted / tilted.sum(-1, keepdim=True)
    missing = (mean[..., None] - (tilted * nodes).sum(-1, keepdim=True)) * known
    least, most = (nodes == nodes.amin(-1, keepdim=True)), (nodes == nodes.amax(-1, keepdim=True))
    extreme = torch.where(missing < 0, least, most)
    extreme = extreme / extreme.sum(-1, keepdim=True)
    share = ratio(missing, (extreme * nodes).sum(-1, keepdim=True) - mean[..., None] + missing).clamp(0, 1)
    return tilted + share * (extreme - tilted)


def leave_one_out(spectrum: Spectrum) -> Spectrum:
    """As a batch in front: the pooled spectrum of all probes but one."""
    parts: list[Spectrum] = [pooled(_without(spectrum, i)) for i in range(spectrum.num_probes)]
    return replace(
        parts[0], values=torch.stack([p.values for p in parts]), weights=torch.stack([p.weights for p in parts])
    )


def _without(spectrum: Spectrum, probe: int) -> Spectrum:
    values, weights = (
        x if len(x) == 1 else torch.cat([x[:probe], x[probe + 1 :]]) for x in (spectrum.values, spectrum.weights)
    )
    return replace(spectrum, values=values, weights=weights, num_probes=spectrum.num_probes - 1)
