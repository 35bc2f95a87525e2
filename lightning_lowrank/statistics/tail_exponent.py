"""Tail exponent, and the one fit behind it and its quality."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum, noise_floor, ratio
from lightning_lowrank.statistics.registry import statistic

FEWEST = 10
WORKSPACE = 2**21


@statistic(
    unit="1",
    tail=True,
    reads_shape=True,
    comparable=False,
    misleads="Every spectrum gets some exponent: read tail_exponent_fit beside it.",
)
def tail_exponent(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Exponent alpha of the power law `density(x) ~ x ** -alpha` that fits the largest squared singular values best.

    The start of the tail minimises the Kolmogorov-Smirnov distance, and alpha is the maximum-likelihood estimate above
    it. Read it beside `tail_exponent_fit`, because every spectrum gets some exponent. For small matrices it depends on
    their size, and it depends on reshaping. Values for Gaussian matrices are no useful comparison: the choice of the
    tail is then random, and the standard deviation over draws is half the mean. WeightWatcher's `alpha` is the same
    from 20 eigenvalues on. Below 20 it uses a bias-corrected estimator and chooses the tail differently.

    Args:
        spectrum: Must be whole; NaN for a sketch.

    Returns:
        Above 1. NaN if fewer than 10 values are above the noise floor of `numerical_rank`, or if all are equal.

    Examples:
        >>> tail_exponent(svd(torch.diag(torch.arange(1.0, 201.0) ** -0.5)))
        tensor(2.0182, dtype=torch.float64)

    References:
        Clauset, Shalizi & Newman (2009), SIAM Review 51(4), equations 3.1 and 3.9; Martin & Mahoney (2021), JMLR
        22(165), for weight matrices.
    """
    return power_law_fit(spectrum)[0]


def power_law_fit(spectrum: Spectrum) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """Exponent and Kolmogorov-Smirnov distance of the best of the power laws that begin at each of the values."""
    unit = spectrum.unit
    held = unit > noise_floor(spectrum.shape)
    logs = torch.where(held, 2 * unit.clamp(min=torch.finfo(unit.dtype).tiny).log(), 0.0)
    counts = torch.arange(1, unit.shape[-1] + 1, dtype=unit.dtype, device=unit.device)
    rates = ratio(counts, logs.cumsum(-1) - counts * logs)  # alpha - 1, were the tail to begin here
    usable = held & (rates > 0) & (held.sum(-1, keepdim=True) >= FEWEST)
    distances = torch.where(usable, _distances(logs, rates, counts), torch.inf)
    best = distances.argmin(-1, keepdim=True)
    found = usable.any(-1)
    exponent, distance = (1 + rates).gather(-1, best)[..., 0], distances.gather(-1, best)[..., 0]
    return torch.where(found, exponent, torch.nan), torch.where(found, distance, torch.nan)


def _distances(
    logs: Float[Tensor, "*B K"], rates: Float[Tensor, "*B K"], counts: Float[Tensor, " K"]
) -> Float[Tensor, "*B K"]:
    """Largest gap between the shares of values above each value, in the data and in each law; a few laws at a time, to
    bound memory.
    """
    at_once = max(1, WORKSPACE // max(1, logs.numel()))
    parts = [
        _gaps(
            logs,
            logs[..., i : i + at_once, None],
            rates[..., i : i + at_once, None],
            counts,
            counts[i : i + at_once, None],
        )
        for i in range(0, logs.shape[-1], at_once)
    ]
    return torch.cat(parts, -1)


def _gaps(logs: Tensor, first: Tensor, rate: Tensor, counts: Tensor, size: Tensor) -> Tensor:
    above = ((first - logs[..., None, :]) * rate).exp_()
    return above.sub_(counts / size).abs_().masked_fill_(counts > size, 0.0).amax(-1)
