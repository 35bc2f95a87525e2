"""The spectrum of a Gaussian matrix of a given shape: the null for ranks.

Shape letters:  K short side of the matrix
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum

NODES = 8192


@lru_cache(maxsize=4096)
def null(shape: tuple[int, int]) -> Spectrum:
    """Spectrum of a Gaussian matrix of that shape and of unit energy: the quantiles (i - 1/2) / K of the
    Marchenko-Pastur law.

    What a statistic gives here is what it gives on a random matrix, but for fluctuations and for corrections in 1/K
    that are largest in the topmost value. Statistics of Gaussian matrices over those of this spectrum (mean of 200, of
    8 for the largest):

    | shape | `energy_rank` | `stable_rank` | `effective_rank` | `participation_ratio` | `nuclear_to_spectral` |
    |---|---|---|---|---|---|
    | 8 x 8 | 0.90 | 0.99 | 0.97 | 0.96 | 0.98 |
    | 8 x 64 | 1.00 | 0.98 | 1.00 | 0.98 | 0.99 |
    | 32 x 32 | 0.98 | 0.97 | 0.99 | 0.98 | 0.98 |
    | 128 x 128 | 0.99 | 0.99 | 1.00 | 1.00 | 0.99 |
    | 512 x 2048 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |

    On the CPU in float64, whatever the device of the matrix: a table that is made once per shape.

    References:
        Marchenko & Pastur (1967), Math. USSR-Sbornik 1(4), equation 1.14.
    """
    short, long = sorted(shape)
    if short == 0:
        values = torch.zeros(1, dtype=torch.float64, device="cpu")
    else:
        values = quantiles(short, long)
        values = values / torch.linalg.vector_norm(values)
    return Spectrum(values, torch.ones_like(values), shape)


def quantiles(short: int, long: int) -> Float[Tensor, " K"]:
    """Singular values, largest first, of a Gaussian matrix whose entries have variance `1 / long`."""
    aspect = short / long
    # With lambda = 1 + aspect + 2 sqrt(aspect) cos(angle) the law's square roots at both edges become a smooth density
    # of the angle.
    edges = torch.arange(NODES + 1, dtype=torch.float64, device="cpu") * (math.pi / NODES)
    angles = edges[:-1] + math.pi / NODES / 2
    # The density of each cell is that of its middle; the mass is what lies before each edge.
    density = angles.sin().square() / (1 + aspect + 2 * math.sqrt(aspect) * angles.cos())
    mass = torch.cat([density.new_zeros(1), density.cumsum(-1)])
    asked = (torch.arange(short, dtype=torch.float64, device="cpu") + 0.5) / short * mass[-1]
    right = torch.searchsorted(mass, asked).clamp(1, NODES)
    part = ((asked - mass[right - 1]) / (mass[right] - mass[right - 1])).clamp(0, 1)
    return (1 + aspect + 2 * math.sqrt(aspect) * (edges[right - 1] + part * (math.pi / NODES)).cos()).sqrt()


@lru_cache(maxsize=4096)
def edge_over_median(shape: tuple[int, int], deviations: float) -> float:
    """How far above the median singular value of a Gaussian matrix its largest one may lie.

    Args:
        shape: Rows and columns of the matrix.
        deviations: Quantile of the Tracy-Widom law of order 1 in question; 3.27 is passed by one matrix in a thousand.

    References:
        Johnstone (2001), Annals of Statistics 29(2), Theorem 1.1, for centre and width of the largest eigenvalue.
        Gavish & Donoho (2014), IEEE Trans. Inf. Theory 60(8), Section III.E, for the noise level from the median.
    """
    short, long = sorted(shape)
    values = quantiles(short, long) * math.sqrt(long)
    median = float(values[(short - 1) // 2] + values[short // 2]) / 2
    root_long, root_short = math.sqrt(max(long - 1, 1)), math.sqrt(short)
    centre = (root_long + root_short) ** 2
    width = (root_long + root_short) * (1 / root_long + 1 / root_short) ** (1 / 3)
    return math.sqrt(centre + deviations * width) / median
