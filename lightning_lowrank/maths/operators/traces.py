"""Estimates over the whole spectrum of an operator: sums over its eigenvalues, from products with random vectors.

What is known of the top is taken out first, so that chance acts on the rest alone.

Shape letters:  P size of the operator   k known pairs   n probes   m steps   L parameters   K nodes   G cells of a grid
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.operators.eigenspaces import Eigenpairs
from lightning_lowrank.maths.operators.estimates import Estimate, student
from lightning_lowrank.maths.operators.operators import Layout, Operator, dense
from lightning_lowrank.maths.spectra.lanczos import krylov, quadrature
from lightning_lowrank.maths.spectra.sketch import counting_error, leave_one_out
from lightning_lowrank.maths.spectra.spectrum import (
    Spectrum,
    descending,
    eigenvalues,
    full_precision,
    lengths_of,
    pooled,
    ratio,
    working_dtype,
)


@dataclass(frozen=True)
class SpectralEstimate:
    """Estimates about an operator from random vectors and known eigenpairs.

    Attributes:
        spectrum: Signed roots of its eigenvalues, one estimate per probe: `trace`, `negative_mass` and the statistics
            of energies take it.
        coupling: What the known pairs, not quite exact, keep of the squares: to be added to the sum of the spectrum's.
        layer_traces: Of the diagonal block of each parameter, one estimate per probe; empty without a layout.
        layer_squares: Squared Frobenius norm of the rows of each parameter, one estimate per probe.
        images: Products of the operator with the random vectors.
    """

    spectrum: Spectrum
    coupling: Float[Tensor, ""]
    layer_traces: Float[Tensor, "n L"]
    layer_squares: Float[Tensor, "n L"]
    images: Float[Tensor, "n P"]


def spectral_estimate(
    operator: Operator,
    signs: Float[Tensor, "n P"],
    *,
    images: Float[Tensor, "n P"] | None = None,
    known: Eigenpairs | None = None,
    steps: int,
    layout: Layout | None = None,
) -> SpectralEstimate:
    """Stochastic Lanczos quadrature on the complement of the known eigenvectors, from signs drawn at random: `steps`
    products for each.

    With one step it is Hutchinson's estimate of the trace, exact where nothing outside of the diagonal is left, and of
    the trace of the square. Sums over up to `2 steps - 1` powers of the eigenvalues are without bias. Of others, such
    as the negative mass, the quadrature of an indefinite operator takes about 40 steps, and 10 are enough for a
    positive one.

    Args:
        signs: At least 2 vectors of `random_signs`, for there to be an error.
        images: Products of the operator with them, if they are known.
        known: Pairs of this very operator, converged or not.
        layout: Where the operator's rows are those of parameters.

    References:
        Ubaru, Chen & Saad (2017), SIAM J. Matrix Analysis 38(4); deflation as in Meyer, Musco, Musco & Woodruff (2021),
        SOSA, Algorithm 1.
    """
    if len(signs) < 2:
        raise ValueError(f"an estimate with an error needs at least 2 probes, not {len(signs)}")
    with full_precision(operator.device):
        known, steps = known or _nothing(operator), min(steps, operator.size)
        vectors, of_known, wide = known.vectors, known.images(), working_dtype(operator.device)
        images = torch.stack([operator.multiply(vector) for vector in signs]) if images is None else images
        # The vectors outside of the known, and their products: what those of the known are is no new one.
        along = signs @ vectors.mT
        starts, left = (
            torch.addmm(rows, along, basis, alpha=-1) for rows, basis in ((signs, vectors), (images, of_known))
        )
        lengths = torch.linalg.vector_norm(starts, dim=-1)
        parts = zip(starts, _outside(left, vectors), lengths, strict=True)
        projected = torch.stack([_projected(operator, vectors, *part, steps) for part in parts])
        counts = lengths.to(wide).square()
        layer_traces = layer_squares = signs[:, :0]
        if layout is not None:
            layer_traces = layout.sums(signs * left) + layout.sums((of_known * vectors).sum(0))
            layer_squares = layout.energies(left) + layout.energies(of_known).sum(0)
        spectrum = _spectrum(known, projected.to(wide), counts, operator.size)
        return SpectralEstimate(spectrum, 2 * known.residuals.square().sum(), layer_traces, layer_squares, images)


def random_signs(operator: Operator, num: int, generator: torch.Generator) -> Float[Tensor, "n P"]:
    """Vectors of as many entries as an operator has rows, each 1 or -1 by chance.

    Args:
        generator: On the device of the operator.
    """
    drawn = [torch.randint(0, 2, (operator.size,), generator=generator, device=operator.device) for _ in range(num)]
    return torch.stack([bits.to(operator.dtype) * 2 - 1 for bits in drawn])


def exact_spectrum(operator: Operator) -> Spectrum:
    """All eigenvalues of a small operator, as signed roots, by as many products as it has rows."""
    with full_precision(operator.device):
        found = eigenvalues(dense(operator).to(working_dtype(operator.device)))
        values, weights = descending(_signed_root(found), torch.ones_like(found))
        return Spectrum(values, weights, (operator.size, operator.size))


def debiased(statistic: Callable[[Spectrum], Tensor], spectrum: Spectrum) -> Estimate:
    """A statistic of a spectrum, corrected for its mean bias from random probes by the jackknife over the probes.

    An exact spectrum needs no correction and has no error. The error has three parts: the variation over the probes,
    the difference to a quadrature with half of the steps, and one step of a counting statistic.

    References:
        Efron & Stein (1981), Annals of Statistics 9(3), equations 1.2 and 1.3.
    """
    value = statistic(spectrum)
    if not spectrum.num_probes:
        return Estimate(value, torch.zeros_like(value))
    left_out = statistic(leave_one_out(spectrum))
    others = spectrum.num_probes - 1
    spread = (left_out - left_out.mean(0)).square().mean(0)
    error = student(spectrum.num_probes) * (others * spread).sqrt()
    error = error + counting_error(statistic, spectrum, value)
    if spectrum.coarse is not None:
        error = error + (value - statistic(spectrum.coarse)).abs()
    return Estimate(value - others * (left_out.mean(0) - value), error)


def sample_mean(samples: Float[Tensor, "n *B"]) -> Estimate:
    """The mean of independent samples."""
    return Estimate(samples.mean(0), student(len(samples)) * samples.std(0) / len(samples) ** 0.5)


def trace(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Sum of the eigenvalues, of a spectrum of their signed roots."""
    spectrum = pooled(spectrum)
    return (spectrum.weights * _eigenvalues(spectrum)).sum(-1)


def negative_mass(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Sum of the magnitudes of negative eigenvalues over the sum of all: between 0 and 1; 0 for a zero operator."""
    spectrum = pooled(spectrum)
    masses = spectrum.weights * _eigenvalues(spectrum).abs()
    return ratio(torch.where(spectrum.values < 0, masses, 0.0).sum(-1), masses.sum(-1))


def trace_of_square(found: SpectralEstimate) -> Estimate:
    """Sum of the squared eigenvalues: the squared Frobenius norm."""
    return debiased(lambda spectrum: _squares(spectrum) + found.coupling, found.spectrum)


def participation_ratio(found: SpectralEstimate, *, positive: bool = False) -> Estimate:
    """Square of the sum of the eigenvalues' magnitudes over the sum of their squares: as many equal ones would be as
    spread out.

    Args:
        positive: Whether no eigenvalue is negative: the sum is then the trace, which one step gives.
    """

    def formula(spectrum: Spectrum) -> Tensor:
        magnitudes = (pooled(spectrum).weights * pooled(spectrum).values.square()).sum(-1)
        total = trace(spectrum) if positive else magnitudes
        return ratio(total.square(), _squares(spectrum) + found.coupling)

    return debiased(formula, found.spectrum)


@dataclass(frozen=True)
class Density:
    """How the eigenvalues lie along the line.

    Attributes:
        grid: Centres of cells of one width.
        curve: Part of all eigenvalues per unit, smoothed by a Gaussian.
        error: Its error, as of an `Estimate`; 0 where the spectrum is exact.
        counts: How many eigenvalues are in each cell, fractions included.
    """

    grid: Float[Tensor, " G"]
    curve: Float[Tensor, " G"]
    error: Float[Tensor, " G"]
    counts: Float[Tensor, " G"]


def density(spectrum: Spectrum, *, num_cells: int = 128, width: float = 0.01) -> Density:
    """The spectral density, on a grid from three widths below the smallest eigenvalue to three above the largest.

    Args:
        width: Standard deviation of the Gaussian, in units of the range of the eigenvalues.

    References:
        Lin, Saad & Yang (2016), SIAM Review 58(1), Section 3.
    """
    values = torch.where(spectrum.weights > 0, _eigenvalues(spectrum), 0.0)
    low, high = values.min(), values.max()
    sigma = width * torch.where(high > low, high - low, 1.0)
    low, high = low - 3 * sigma, high + 3 * sigma
    cell = (high - low) / num_cells
    grid = low + cell * (torch.arange(num_cells, device=values.device, dtype=values.dtype) + 0.5)
    curves = _smoothed(spectrum, grid, sigma)
    smooth = sample_mean(curves) if spectrum.num_probes else Estimate(curves, torch.zeros_like(grid))
    whole = pooled(spectrum)
    at = ((_eigenvalues(whole) - low) / cell).long().clamp(0, num_cells - 1)
    return Density(grid, smooth.value, smooth.error, torch.zeros_like(grid).index_add(-1, at, whole.weights))


def _smoothed(spectrum: Spectrum, grid: Float[Tensor, " G"], sigma: Float[Tensor, ""]) -> Float[Tensor, "*B G"]:
    distances = (grid - _eigenvalues(spectrum)[..., None]) / sigma
    bells = torch.exp(-distances.square() / 2) / (sigma * (2 * torch.pi) ** 0.5)
    shares = spectrum.weights / spectrum.weights.sum(-1, keepdim=True)
    curves: Tensor = (shares[..., None] * bells).sum(-2)
    return curves


def _projected(
    operator: Operator,
    vectors: Float[Tensor, "k P"],
    start: Float[Tensor, " P"],
    product: Float[Tensor, " P"],
    length: Float[Tensor, ""],
    steps: int,
) -> Float[Tensor, "m m"]:
    """The operator on the complement of orthonormal rows, in the Krylov space of a start vector there.

    Args:
        product: With the start vector, in the complement.
        length: Of the start vector.
    """
    unit, image = ratio(start, length), ratio(product, length)
    if steps == 1:
        # What has the same first two moments: the length of the product is known, and no third is asked for.
        mean = unit.dot(image)
        across = lengths_of(image - mean * unit)
        return torch.stack([mean, across, across, mean]).view(2, 2)
    ready = [image]

    def multiply(vector: Tensor) -> Tensor:
        return ready.pop() if ready else _outside(operator.multiply(vector)[None], vectors)[0]

    return krylov(multiply, unit, steps).projected


def _outside(rows: Float[Tensor, "n P"], basis: Float[Tensor, "k P"]) -> Float[Tensor, "n P"]:
    """What vectors have outside of the span of orthonormal rows."""
    return torch.addmm(rows, rows @ basis.mT, basis, alpha=-1)


def _nothing(operator: Operator) -> Eigenpairs:
    none = torch.zeros(0, operator.size, device=operator.device, dtype=operator.dtype)
    return Eigenpairs(none[:, 0], none, none[:, :0], none, none[:, 0], none[:, 0])


def _spectrum(known: Eigenpairs, projected: Float[Tensor, "n m m"], counts: Float[Tensor, " n"], size: int) -> Spectrum:
    """Known eigenvalues one by one, the rest by quadrature."""
    # Of two steps sums of squares are exact, and nothing else is asked for.
    half = max((projected.shape[-1] + 1) // 2, min(2, projected.shape[-1]))
    fine, coarse = (_joined(known, part, counts, size) for part in (projected, projected[:, :half, :half]))
    return Spectrum(fine.values, fine.weights, fine.shape, whole=False, num_probes=fine.num_probes, coarse=coarse)


def _joined(known: Eigenpairs, projected: Float[Tensor, "n m m"], counts: Float[Tensor, " n"], size: int) -> Spectrum:
    nodes, weights = quadrature(projected)
    atoms = known.values.to(nodes).expand(len(nodes), -1)
    values, weights = descending(
        _signed_root(torch.cat([atoms, nodes], -1)), torch.cat([torch.ones_like(atoms), weights * counts[:, None]], -1)
    )
    return Spectrum(values, weights, (size, size), whole=False, num_probes=len(nodes))


def _signed_root(values: Tensor) -> Tensor:
    return values.sign() * values.abs().sqrt()


def _eigenvalues(spectrum: Spectrum) -> Tensor:
    return spectrum.values * spectrum.magnitudes


def _squares(spectrum: Spectrum) -> Tensor:
    spectrum = pooled(spectrum)
    return (spectrum.weights * spectrum.values**4).sum(-1)
