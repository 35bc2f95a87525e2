"""Drift of a spectrum."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum, ratio
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", tail=True, partner="previous", comparable=False)
def spectrum_drift(now: Spectrum, before: Spectrum) -> Float[Tensor, "*B"]:
    """Share of the energy that has moved from some ranks of the spectrum to others since the sample before.

    Half the sum of absolute differences between the shares of energy `s_i^2 / sum s^2`, largest first. Scale and
    directions do not matter, so a spectrum that has settled has 0. Two Gaussian matrices have 0.019 at 64 by 64, 0.034
    at 16 by 64 and 0.006 at 256 by 256: so much is chance in gradients of noise.

    Args:
        now: Whole.
        before: The same for the sample before, with as many values.

    Returns:
        Between 0 and 1. NaN where either is of a zero matrix, or only sketched.

    Examples:
        >>> before, after = svd(torch.eye(2)), svd(torch.diag(torch.tensor([3.0, 1.0])))
        >>> spectrum_drift(after, before)
        tensor(0.4000, dtype=torch.float64)

    References:
        Total variation distance. The normalised spectrum as a density: Roy & Vetterli (2007), The Effective Rank.
    """
    distance = (_shares(now) - _shares(before)).abs().sum(-1) / 2
    return torch.where((now.top == 0) | (before.top == 0), torch.nan, distance)


def _shares(spectrum: Spectrum) -> Float[Tensor, "*B K"]:
    return ratio(spectrum.unit_energies, spectrum.unit_energies.sum(-1, keepdim=True))
