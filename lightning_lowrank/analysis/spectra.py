"""Ranks of every matrix of a checkpoint, with the names and formulas of `RankMonitor`.

Shape letters:  K singular values
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lightning_lowrank.analysis.matrices import Place
from lightning_lowrank.maths.spectra.decompose import SKETCH_ABOVE, decompose
from lightning_lowrank.maths.spectra.order_statistics import order_statistics
from lightning_lowrank.maths.spectra.sketch import estimate
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.statistics import find

# Ranks, each rank over what a Gaussian matrix of the same shape gives, the tail and the outliers, the size.
STATISTICS = (
    "energy_rank",
    "stable_rank",
    "effective_rank",
    "participation_ratio",
    "numerical_rank",
    "relative_energy_rank",
    "relative_stable_rank",
    "relative_effective_rank",
    "relative_participation_ratio",
    "tail_exponent",
    "tail_exponent_fit",
    "marchenko_pastur_outliers",
    "spectral_norm",
    "frobenius_norm",
)


@dataclass(frozen=True)
class Row:
    """Results for one matrix.

    Attributes:
        name: Name of the matrix.
        shape: Rows and columns.
        values: Statistic -> value; NaN if the matrix is not finite. Tails are NaN, too, if it was sketched.
        errors: Statistic -> error; 0 if the spectrum is exact.
        singular: Singular values, largest first; empty if the matrix was sketched.
        orders: Frobenius norm and order statistics of the singular values, for the spectrum in the tab.
    """

    name: str
    shape: tuple[int, int]
    values: dict[str, float]
    errors: dict[str, float]
    singular: Float[Tensor, " K"] | None
    orders: NDArray[np.float64]

    @property
    def finite(self) -> bool:
        """Whether all entries of the matrix are finite."""
        return math.isfinite(next(iter(self.values.values())))


def spectra(
    checkpoint: Checkpoint,
    found: Iterable[Place],
    statistics: Sequence[str] = STATISTICS,
    *,
    sketch_above: int = SKETCH_ABOVE,
    seed: int = 0,
) -> Iterator[Row]:
    """Statistics of the spectra of a checkpoint's matrices, one tensor in memory at a time.

    Cost: a Gram matrix and its eigenvalues per matrix; above `sketch_above`, products with a block of vectors.

    Args:
        found: The result of `places`.
        statistics: Names of statistics, as on the concepts page.
        sketch_above: Matrices are decomposed exactly if their short side is at most this.
        seed: Seed of the sketches.

    Raises:
        ValueError: A statistic is unknown.
    """
    asked = [find(name) for name in statistics]
    generator = torch.Generator().manual_seed(seed)
    for place in found:
        for label, matrix in place.matrices(checkpoint):
            (spectrum,) = decompose([matrix], "values", generator=generator, sketch_above=sketch_above).spectra
            pairs = {one.name: estimate(one, spectrum) for one in asked}
            yield Row(
                label,
                (matrix.shape[0], matrix.shape[1]),
                {name: float(value) for name, (value, _) in pairs.items()},
                {name: float(error) for name, (_, error) in pairs.items()},
                spectrum.magnitudes if spectrum.whole else None,
                order_statistics(spectrum).double().numpy(),
            )
