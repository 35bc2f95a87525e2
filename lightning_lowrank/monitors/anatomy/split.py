"""The origin of a linear layer's gradient: its inputs, the gradients of its outputs, and their product.

Shape letters:  T rows   N inputs   M outputs   K directions   w width of a block of trial vectors
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.marchenko_pastur import null
from lightning_lowrank.maths.spectra.sketch import top
from lightning_lowrank.maths.spectra.spectrum import (
    Spectrum,
    eigenvectors,
    full_precision,
    ratio,
    short_gram,
    working_dtype,
)
from lightning_lowrank.monitors.anatomy.spikes import Outlier, chance_cosine, mean_is_told, outlier
from lightning_lowrank.statistics import participation_ratio, stable_rank

# More rows than these tell little of a spectrum, and cost the third power.
SOLVED = 1024
# What may lie between the product of the two sides and the layer's gradient, as a share of the latter: rounding of half
# precision passes.
LARGEST_DEVIATION = 0.05
# Trial vectors beside those that are wanted, and how often they are multiplied.
BESIDE, ROUNDS = 6, 8
# Share of the gradient's energy of which more is residue or spike where one of the two rules.
RULING = 0.5
# Share of the energy of the signals that their directions are to hold.
ENERGY = 0.95
# Singular values below this share of the first are rounding, and their vectors any.
SMALLEST = 1e-5

SHARES = ("residue", "interpolant", "spike", "bulk")


@dataclass(frozen=True)
class Sides:
    """Rows that a layer saw, and its gradient.

    Attributes:
        inputs: Rows that came in.
        signals: The gradient of the loss in what came out, the same rows.
        gradient: Of the weight: of all rows, not only those of the sample.
        num_rows: How many there were.
    """

    inputs: Float[Tensor, "T N"]
    signals: Float[Tensor, "T M"]
    gradient: Float[Tensor, "M N"]
    num_rows: int


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions, some of which count.

    Attributes:
        directions: As rows.
        live: 1 for those that count, 0 for the others.
    """

    directions: Float[Tensor, "K N"]
    live: Float[Tensor, " K"]

    @property
    def size(self) -> Float[Tensor, ""]:
        """How many count."""
        return self.live.sum()

    @property
    def counted(self) -> Float[Tensor, "K N"]:
        """The others are zero."""
        return self.directions * self.live[:, None]


@dataclass(frozen=True)
class Principal:
    """Principal components of rows.

    Attributes:
        eigenvalues: Of the covariance, largest first; as many as the shorter side has.
        first: The first component.
        num_rows: Of which rows.
    """

    eigenvalues: Float[Tensor, " S"]
    first: Float[Tensor, " N"]
    num_rows: int


@dataclass(frozen=True)
class Split:
    """An anatomy.

    Attributes:
        values: By name.
        errors: Of what is estimated.
        top: The gradient's first right singular vector.
    """

    values: dict[str, Float[Tensor, ""]]
    errors: dict[str, Float[Tensor, ""]]
    top: Float[Tensor, " N"]


def anatomy(sides: Sides, num_outputs: int) -> Split:
    """All that is asked of one layer in one step; what cannot be told reliably is NaN.

    Args:
        sides: What was seen.
        num_outputs: Of the model: as many directions of the signals are the residue's, at most.
    """
    with full_precision(sides.gradient.device):
        dtype = working_dtype(sides.gradient.device)
        inputs, signals, gradient = (
            _scaled(matrix.to(dtype)) for matrix in (sides.inputs, sides.signals, sides.gradient)
        )
        mean, few = inputs.mean(0), signals[:SOLVED]
        of_inputs = principal(inputs - mean)
        told = outlier(of_inputs.eigenvalues, of_inputs.num_rows, inputs.shape[1], sides.num_rows)
        k = min(num_outputs, *few.shape)
        spikes, residues = _spikes(mean, of_inputs, told), signal_basis(few, k)
        singular, vectors = top_right(gradient, min(k + 1, *gradient.shape))
        values = split(gradient, residues, spikes) | _ranks(of_inputs, few, gradient)
        # A zero has no directions, though the decomposition gives some.
        vectors = torch.where(singular[0] > 0, vectors, torch.nan)
        values["low_rank_share"] = torch.where(
            singular[0] > 0, ratio(singular.square().sum(), gradient.square().sum()), torch.nan
        )
        by_chance = null((gradient.shape[0], gradient.shape[1])).values.square()
        values["low_rank_share_chance"] = by_chance[: len(singular)].sum().to(singular)
        values["horn"] = horn(inputs[:SOLVED], few)
        first_two = Basis(vectors[:2], (singular[:2] > SMALLEST * singular[0]).to(vectors))
        values |= alignment(first_two, spikes) | _reliability(told, sides, residues, spikes)
        return Split(values, {"bulk_decay": told.alpha_error, "spike_strength": told.nu_error}, vectors[0])


def split(gradient: Float[Tensor, "M N"], residues: Basis, spikes: Basis) -> dict[str, Float[Tensor, ""]]:
    """Shares of the gradient's energy by the signals' directions on its left and the inputs' on its right; they sum to
    one.

    Residue: left inside, right outside. Interpolant: both inside. Spike: left outside, right inside. Bulk: both
    outside. With what random directions, as many, would give of each as `_chance`. Which of residue and spike rules is
    told where both hold more than half. NaN where no direction of the inputs counts, or the signals' are all there are.
    """
    left, right = residues.counted @ gradient, gradient @ spikes.counted.mT
    energy, both = gradient.square().sum(), (left @ spikes.counted.mT).square().sum()
    residue, spike = (
        ratio(left.square().sum() - both, energy).clamp(min=0),
        ratio(right.square().sum() - both, energy).clamp(min=0),
    )
    interpolant = ratio(both, energy)
    on_left, on_right = residues.size / gradient.shape[0], spikes.size / gradient.shape[1]
    shares = (residue, interpolant, spike, (1 - residue - interpolant - spike).clamp(min=0))
    by_chance = (on_left * (1 - on_right), on_left * on_right, (1 - on_left) * on_right, (1 - on_left) * (1 - on_right))
    is_told = (spikes.size > 0) & (on_left < 1) & (energy > 0)
    named = dict(zip((*SHARES, *(f"{name}_chance" for name in SHARES)), (*shares, *by_chance), strict=True))
    named["spike_dominance"] = torch.where(spike + residue > RULING, ratio(spike, spike + residue), torch.nan)
    return {name: torch.where(is_told, value, torch.nan) for name, value in named.items()}


def input_basis(inputs: Float[Tensor, "T N"]) -> Basis:
    """The mean of rows and their first principal component, made orthogonal, each where it can be told from noise."""
    mean = inputs.mean(0)
    found = principal(inputs - mean)
    return _spikes(mean, found, outlier(found.eigenvalues, found.num_rows, inputs.shape[1], len(inputs)))


def principal(centred: Float[Tensor, "T N"]) -> Principal:
    """All eigenvalues of the covariance, and the first principal component, of as many rows as are worth it."""
    some = centred if centred.shape[1] <= SOLVED else centred[:SOLVED]
    gram, scale = short_gram(some, working_dtype(some.device))
    values, vectors = eigenvectors(gram)
    last = vectors[:, -1].to(some)
    first = last if some.shape[0] > some.shape[1] else some.mT @ last
    eigenvalues = values.flip(-1).clamp(min=0) * scale.square() / len(some)
    return Principal(eigenvalues.to(some), ratio(first, first.norm()), len(some))


def signal_basis(signals: Float[Tensor, "T M"], k: int) -> Basis:
    """The top right singular vectors of signals, as few of k as hold 95 % of the energy, one at least."""
    values, vectors = top_right(signals, k)
    before = values.square().cumsum(0) - values.square()
    return Basis(vectors, (before < ENERGY * signals.square().sum()).to(vectors.dtype))


def alignment(vectors: Basis, spikes: Basis) -> dict[str, Float[Tensor, ""]]:
    """Part of the gradient's right space in the inputs' directions, over the most that there could be; and what chance
    gives.
    """
    few = torch.minimum(spikes.size, vectors.size)
    shared = (vectors.counted @ spikes.counted.mT).square().sum()
    chance = torch.maximum(spikes.size, vectors.size) / vectors.directions.shape[1]
    blank = torch.where(few > 0, 1.0, torch.nan)
    return {"alignment": shared / few * blank, "alignment_chance": chance * blank}


def horn(inputs: Float[Tensor, "T N"], signals: Float[Tensor, "T M"]) -> Float[Tensor, ""]:
    """Geometric mean of the first two singular values of the product of both sides, over that of the products of
    theirs: at most 1.

    References:
        Horn (1950), On the singular values of a product of completely continuous operators, PNAS 36(7).
    """
    k = min(2, *inputs.shape, signals.shape[1])
    x, d = inputs.float(), signals.float()
    product, _ = _iterated(lambda v: d.mT.to(v) @ (x.to(v) @ v), lambda u: x.mT @ (d @ u), inputs[0], k)
    most = top_right(inputs, k)[0] * top_right(signals, k)[0]
    return ratio(product, most).log().mean().exp()


def deviation(product: Float[Tensor, "M K"], gradient: Float[Tensor, "M K"]) -> Float[Tensor, ""]:
    """Length of what is left of the gradient when the product of both sides, times the best factor, is taken off; a
    share of its length.

    Of both in a few random directions, which have it without bias. A factor does not count: scalers of half precision
    and averages over processes put one there.
    """
    factor = ratio((product * gradient).sum(), product.square().sum())
    return ratio((factor * product - gradient).norm(), gradient.norm())


def top_right(matrix: Float[Tensor, "M N"], k: int) -> tuple[Float[Tensor, " K"], Float[Tensor, "K N"]]:
    """The largest singular values and, as rows, the right singular vectors, by block iteration.

    Vectors whose value is within a few per cent of one beyond the block are mixtures of such.
    """
    low = matrix.float()
    return _iterated(lambda v: (low if v.dtype == low.dtype else matrix) @ v, lambda u: low.mT @ u, matrix[0], k)


def _iterated(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], like: Float[Tensor, " N"], k: int
) -> tuple[Float[Tensor, " K"], Float[Tensor, "K N"]]:
    size = like.shape[0]
    draws = torch.Generator(like.device).manual_seed(0)
    block = torch.randn(size, min(size, k + BESIDE), generator=draws, dtype=torch.float32, device=like.device)
    block, _ = torch.linalg.qr(block)
    for _ in range(ROUNDS if block.shape[1] < size else 0):
        block, _ = torch.linalg.qr(adjoint(forward(block)))
    # Directions are good enough in float32; lengths and angles are those of the working precision.
    block, _ = torch.linalg.qr(block.to(like.dtype))
    image = forward(block)
    values, rotation = eigenvectors(image.mT @ image)
    return values.flip(-1)[:k].clamp(min=0).sqrt(), (block @ rotation.flip(-1)[:, :k]).mT


def _spikes(mean: Float[Tensor, " N"], found: Principal, told: Outlier) -> Basis:
    length = mean.norm()
    along = ratio(mean, length)
    has_mean = mean_is_told(mean, found.eigenvalues, found.num_rows) * (length > 0)
    beside = found.first - has_mean * (found.first @ along) * along
    is_told = told.is_told & (beside.norm() > 1e-6)
    directions = torch.stack([along, ratio(beside, beside.norm())])
    return Basis(directions, torch.stack([has_mean, is_told.to(has_mean)]))


def _ranks(
    inputs: Principal, signals: Float[Tensor, "T M"], gradient: Float[Tensor, "M N"]
) -> dict[str, Float[Tensor, ""]]:
    """Of both sides and of their product, and which side has the lower."""
    of_inputs = Spectrum(
        inputs.eigenvalues.sqrt(), torch.ones_like(inputs.eigenvalues), (inputs.num_rows, len(inputs.first))
    )
    spectra: dict[str, Spectrum] = {"input": of_inputs, "signal": top(signals), "gradient": top(gradient)}
    found = {f"{side}_stable_rank": stable_rank(spectrum) for side, spectrum in spectra.items()}
    found |= {f"{side}_participation_ratio": participation_ratio(spectrum) for side, spectrum in spectra.items()}
    found["signals_limit"] = (found["signal_participation_ratio"] < found["input_participation_ratio"]).to(
        gradient.dtype
    )
    return found


def _reliability(told: Outlier, sides: Sides, residues: Basis, spikes: Basis) -> dict[str, Float[Tensor, ""]]:
    count = torch.full_like(told.gap, 1.0)
    return {
        "gap_ratio": told.gap,
        "spike_overlap": told.overlap,
        "rows_per_dimension": count * len(sides.inputs) / sides.inputs.shape[1],
        "num_residues": residues.size,
        "num_spikes": spikes.size,
        "bulk_decay": told.alpha,
        "spike_strength": told.nu,
        "stability_chance": count * chance_cosine(sides.inputs.shape[1]),
    }


def _scaled(matrix: Float[Tensor, "M N"]) -> Float[Tensor, "M N"]:
    """Over its largest entry: signals may be tiny, or multiplied by a scaler. No number here depends on it."""
    return ratio(matrix, matrix.abs().amax())
