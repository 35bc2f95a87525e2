"""Outliers of the Marchenko-Pastur law."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.marchenko_pastur import edge_over_median
from lightning_lowrank.maths.spectra.spectrum import Spectrum, noise_floor
from lightning_lowrank.statistics.registry import statistic

# The Tracy-Widom law passes 3.27 once in a thousand; below 100 x 100 the median fluctuates as well.
DEVIATIONS = 6.0


@statistic(unit="directions", counts=True, tail=True, reads_shape=True, comparable=False)
def marchenko_pastur_outliers(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Number of singular values above the largest that noise with the same median singular value would have.

    The level of the noise is fitted through the median, which a few strong directions barely move: with r of them out
    of n it rises as if the quantile r / 2n higher had been read, so that weak directions are missed, never invented.
    What is not a Gaussian bulk (heavy-tailed entries, rows of unequal size, a spectrum that falls as a power) has
    "outliers" without number: this counts deviations from one law, not meaning. WeightWatcher's `num_spikes` is another
    number: it fits the law's width to a density of the whole spectrum, with a smaller margin.

    Args:
        spectrum: Whole, else NaN.

    Returns:
        A whole number between 0 and `min(M, N)`; 0 for a zero matrix. Above 0 for 1 % of Gaussian 8 x 8 matrices, 0.2 %
        at 16 x 16, under 0.1 % from
            32 x 32 up.

    Examples:
        >>> noise = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
        >>> marchenko_pastur_outliers(svd(noise + 2 * torch.ones(64, 96)))
        tensor(1., dtype=torch.float64)

    References:
        Gavish & Donoho (2014), IEEE Trans. Inf. Theory 60(8), for noise of unknown level; the margin is the Tracy-Widom
        law's in Johnstone (2001), Theorem 1.1.
    """
    if min(spectrum.shape) == 0:
        return torch.zeros_like(spectrum.top)
    unit = spectrum.unit
    median = (unit[..., (unit.shape[-1] - 1) // 2] + unit[..., unit.shape[-1] // 2]) / 2
    edge = (median * edge_over_median(spectrum.shape, deviations=DEVIATIONS)).clamp(min=noise_floor(spectrum.shape))
    return (spectrum.weights * (unit > edge[..., None])).sum(-1)
