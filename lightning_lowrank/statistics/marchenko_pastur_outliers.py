"""Outliers of the Marchenko-Pastur law."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.marchenko_pastur import edge_over_median
from lightning_lowrank.maths.spectra.spectrum import Spectrum, noise_floor
from lightning_lowrank.statistics.registry import statistic

# The Tracy-Widom law passes 3.27 once in a thousand; below 100 x 100 the median fluctuates as well.
DEVIATIONS = 6.0


@statistic(
    unit="directions",
    counts=True,
    tail=True,
    reads_shape=True,
    comparable=False,
    misleads="Where more than half of the singular values are 0, all others count.",
)
def marchenko_pastur_outliers(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Number of singular values above the largest one that noise with the same median singular value would have.

    The noise level is fitted to the median, which a few strong directions hardly change: r strong directions out of n
    shift it by the quantile r / 2n. As a result, weak directions may be missed, but none is invented. If the bulk is
    not Gaussian (heavy-tailed entries, rows of unequal size, a power-law spectrum), the number of "outliers" can be
    large. This statistic counts deviations from one law, not meaningful directions. WeightWatcher's `num_spikes` is
    different: it fits the law's width to a density of the whole spectrum, with a smaller margin.

    Args:
        spectrum: Must be whole; NaN for a sketch.

    Returns:
        An integer between 0 and `min(M, N)`; 0 for a zero matrix. It is above 0 for 1 % of Gaussian 8 x 8 matrices, for
        0.2 % at 16 x 16, and for less than 0.1 % from 32 x 32 up.

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
