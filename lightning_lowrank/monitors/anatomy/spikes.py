"""Spiked data: rows with one strong direction over a bulk whose spectrum decays, drawn, and told from rows alone.

Shape letters:  T rows   N their width   K eigenvalues, largest first
"""

from dataclasses import dataclass
from math import isfinite, log, sqrt
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import ratio

# Exponents of the power law that are told apart: from a flat spectrum to one that is a single direction.
DECAYS = torch.arange(0, 3.0001, 0.01, dtype=torch.float64, device="cpu")

# Below this ratio of the first eigenvalues the first principal component may be anything; below this squared cosine it
# is mostly noise.
LEAST_GAP, LEAST_OVERLAP = 1.2, 0.5


@dataclass(frozen=True)
class SpikedData:
    """Rows of a spiked covariance model, `inputs = bulk + strength * outer(coordinates, direction)`.

    Attributes:
        inputs: The rows.
        bulk: The rows without the spike: independent Gaussian, where the k-th coordinate has variance `k ** -alpha`.
        coordinates: Coordinate of each row along the spike; standard normal.
        direction: Direction of the spike, of length 1.
        strength: `T ** nu`.
        alpha: Exponent of the bulk.
    """

    inputs: Float[Tensor, "T N"]
    bulk: Float[Tensor, "T N"]
    coordinates: Float[Tensor, " T"]
    direction: Float[Tensor, " N"]
    strength: float
    alpha: float


@dataclass(frozen=True)
class Outlier:
    """Spike and bulk, from the eigenvalues of a sample covariance.

    Attributes:
        gap: First eigenvalue over the second.
        overlap: Squared cosine that the first principal component can be expected to have with the true spike; 0 where
            there is none.
        is_told: Whether both are large enough for that component to be spoken of.
        nu: The spike's standard deviation, over that of the strongest direction of the bulk, is the number of rows to
            this power.
        alpha: Exponent of the power law whose participation ratio is that of the bulk.
        nu_error: Standard error, had the rows been independent and Gaussian, and the bulk a power law.
        alpha_error: The same.
    """

    gap: Float[Tensor, ""]
    overlap: Float[Tensor, ""]
    is_told: Bool[Tensor, ""]
    nu: Float[Tensor, ""]
    alpha: Float[Tensor, ""]
    nu_error: Float[Tensor, ""]
    alpha_error: Float[Tensor, ""]


def spiked_data(
    num_rows: int,
    width: int,
    *,
    nu: float,
    alpha: float = 0.0,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> SpikedData:
    """Draw rows of the spiked covariance model.

    Args:
        num_rows: T, the number of rows.
        width: N, the length of a row.
        nu: The spike has standard deviation `T ** nu`.
        alpha: Eigenvalues of the bulk are `k ** -alpha`.
        generator: Draws all random numbers.
        dtype: Dtype of the rows.

    Raises:
        ValueError: A number is out of range.

    Examples:
        >>> spiked_data(100, 20, nu=0.25, generator=torch.Generator().manual_seed(0)).inputs.shape
        torch.Size([100, 20])

    References:
        Sonthalia, Murray & Montufar (2025), arXiv 2510.01303: the data model of the theorems.
    """
    for name, count in {"num_rows": num_rows, "width": width}.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"spiked_data({name}={count!r}): expected a whole number of at least 1")
    for name, exponent in {"nu": nu, "alpha": alpha}.items():
        if not isinstance(exponent, int | float) or not isfinite(exponent):
            raise ValueError(f"spiked_data({name}={exponent!r}): expected a finite number")
    if not isinstance(generator, torch.Generator) or not dtype.is_floating_point:
        raise ValueError(
            f"spiked_data(generator={generator!r}, dtype={dtype}): expected a torch.Generator and a real "
            "floating-point dtype"
        )
    drawn: dict[str, Any] = {"dtype": dtype, "device": generator.device}
    scales = torch.arange(1, width + 1, dtype=dtype, device=generator.device) ** (-alpha / 2)
    bulk = torch.randn(num_rows, width, generator=generator, **drawn) * scales
    direction = torch.nn.functional.normalize(torch.randn(width, generator=generator, **drawn), dim=0)
    coordinates, strength = torch.randn(num_rows, generator=generator, **drawn), float(num_rows) ** nu
    return SpikedData(
        bulk + strength * torch.outer(coordinates, direction), bulk, coordinates, direction, strength, alpha
    )


def outlier(eigenvalues: Float[Tensor, " K"], num_rows: int, width: int, num_examples: int) -> Outlier:
    """Tell spike and bulk from the eigenvalues of the covariance of a sample of rows.

    The overlap is that of the spiked covariance model with any bulk. Let m be the mean of `1 / (l_j - l_1)` over the
    other ones of the T eigenvalues of the Gram matrix of the rows. The spike's own eigenvalue is then `-1 / m`, and the
    squared cosine is `-m / (l_1 m')`. For a spike l seen as l_1, the squared cosine is `l / l_1` times `d l_1 / d l`;
    with `l = -1 / m(l_1)` this gives the formula.

    Args:
        eigenvalues: Largest first, zeros at the end.
        num_rows: T, the number of rows in the sample.
        width: N, the length of a row.
        num_examples: Number of rows that there were; the strength is a power of it.

    Returns:
        `nu` and `alpha` are NaN for fewer than 64 rows, or if the bulk is steeper than all tested power laws. `nu` is
        also NaN if no spike is found.

    References:
        Bai & Ding (2012), Estimation of spiked eigenvalues in spiked models, for the spike's own eigenvalue; Paul
        (2007), Statistica Sinica 17(4), for the squared cosine with a flat bulk.
    """
    if len(eigenvalues) < 2:  # of one row or one column: there is no bulk
        nothing = torch.full((), torch.nan, dtype=eigenvalues.dtype, device=eigenvalues.device)
        zero = torch.zeros_like(nothing)
        return Outlier(nothing, zero, zero > 0, nothing, nothing, nothing, nothing)
    first, others = eigenvalues[0], eigenvalues[1:]
    apart = others - first
    zeros = max(0, num_rows - len(eigenvalues))
    mean = (apart.reciprocal().sum() - zeros / first) / num_rows
    slope = (apart.square().reciprocal().sum() + zeros / first.square()) / num_rows
    overlap = torch.nan_to_num(-mean / (first * slope)).clamp(0, 1)
    population = -1 / mean
    # The rows' own noise lies in the first eigenvalue too, and the trace is what it is.
    trace = others.sum() + (first - population)
    squares = (others.square().sum() - trace.square() / num_rows).clamp(min=0)
    alpha, slope_of_log, scale = _power_law(ratio(trace.square(), squares), trace, width)
    fourth = (scale * torch.arange(1, width + 1, device=trace.device).to(trace) ** -alpha).pow(4).sum()
    relative = (
        4 / num_rows**2 + 8 * ratio(fourth, squares.square()) / num_rows + 8 * ratio(squares, trace.square()) / num_rows
    )
    alpha_error = relative.sqrt() / slope_of_log
    strength = (population - trace / width) / scale
    nu = 0.5 * strength.log() / log(max(num_examples, 2))
    # Half the relative error of a variance, and of the bulk's scale, which moves with the exponent by the mean log of
    # the ranks.
    shift = log(width) * alpha_error
    nu_error = 0.5 * (2 / num_rows / overlap + shift.square()).sqrt() / log(max(num_examples, 2))
    known = (num_rows >= 64) & torch.isfinite(alpha)
    gap = first / others[0]
    is_told = (gap >= LEAST_GAP) & (overlap >= LEAST_OVERLAP)
    told = known & is_told & (strength > 0)
    blank = torch.full_like(alpha, torch.nan)
    return Outlier(
        gap,
        overlap,
        is_told,
        torch.where(told, nu, blank),
        torch.where(known, alpha, blank),
        torch.where(told, nu_error, blank),
        torch.where(known, alpha_error, blank),
    )


def _power_law(rank: Float[Tensor, ""], trace: Float[Tensor, ""], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exponent of the power law of that participation ratio, the slope of the ratio's logarithm there, and the law's
    first eigenvalue.
    """
    decays = DECAYS.to(trace.device)
    places = torch.arange(1, width + 1, dtype=torch.float64, device=trace.device).log()
    sums = (-decays[:, None] * places).exp().sum(1)
    logs = (sums.square() / (-2 * decays[:, None] * places).exp().sum(1)).log()
    # Falling with the exponent: searched from the other end.
    above = torch.searchsorted(-logs, -rank.log().double()[None]).clamp(1, len(decays) - 1)[0]
    rise = (logs[above - 1] - logs[above]).clamp(min=1e-12)
    part = ((logs[above - 1] - rank.log()) / rise).clamp(0, 1)
    step = float(DECAYS[1])
    alpha = torch.where(rank.log() < logs[-1], torch.nan, decays[above - 1] + part * step)
    scale = trace / (sums[above - 1] + part * (sums[above] - sums[above - 1]))
    return alpha.to(trace), (rise / step).to(trace), scale.to(trace)


def mean_is_told(mean: Float[Tensor, " N"], eigenvalues: Float[Tensor, " K"], num_rows: int) -> Float[Tensor, ""]:
    """1 where the mean of rows is longer than that of as many rows about 0 would be, by four standard deviations; else
    0.
    """
    spread = ratio(eigenvalues.square().sum(), eigenvalues.sum().square())
    excess = ratio(num_rows * mean.square().sum(), eigenvalues.sum())
    return (excess > 1 + 4 * (2 * spread).sqrt()).to(mean.dtype)


def chance_cosine(width: int) -> float:
    """Mean size of the cosine between two random directions, for wide ones."""
    return sqrt(2 / (torch.pi * width))
