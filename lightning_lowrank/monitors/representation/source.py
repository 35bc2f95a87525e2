"""Spectra of what blocks put out."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.power_law import power_law_exponent
from lightning_lowrank.maths.spectra.marchenko_pastur import null
from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.measuring.metrics import spectrum_of_rows
from lightning_lowrank.measuring.number_source import Detail, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.source import Batch, Reading
from lightning_lowrank.measuring.sources.features import Features
from lightning_lowrank.models.blocks import blocks
from lightning_lowrank.models.training import Training
from lightning_lowrank.statistics.effective_rank import effective_rank

Stage = Literal["train", "validation"]
DETAILS: dict[str, Detail] = {
    **{"effective_rank": "core", "centred_effective_rank": "core", "alpha": "core", "alpha_fit": "standard"},
    **{"rows": "standard", "width": "standard", "effective_rank_chance": "all", "alpha_chance": "all"},
}
UNITS = {"rows": "rows", "width": "columns"} | dict.fromkeys(
    ("effective_rank", "centred_effective_rank", "effective_rank_chance"), "directions"
)


class Representations(NumberSource):
    """Spectra of the outputs of blocks, pooled over all rows of a step or of a validation loop.

    Args:
        match: Layers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`. By default the blocks, which are the
            entries of lists of layers of one class; if there are none, all layers that `Features` reads.
        exclude: Patterns of what to leave out, as for `match`.
        stage: "train" or "validation".
        max_width: Outputs wider than this are left out.

    Raises:
        ValueError: `stage` is unknown or `max_width` out of range; in `plan`: a pattern matches nothing, or a layer
            cannot be measured.
    """

    level = "functions"
    shared = True

    def __init__(
        self,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        stage: Stage = "train",
        max_width: int = 2048,
    ) -> None:
        if type(max_width) is not int or max_width < 1:
            raise ValueError(f"max_width={max_width!r} must be a number of columns of at least 1")
        self._match = match
        self._features = Features(exclude=exclude, stage=stage, max_width=max_width)
        self.stage, self.name = stage, "representation" if stage == "train" else f"{stage}_representation"
        self.quantities = [
            Quantity(f"{self.name}_{name}", UNITS.get(name, "1"), per_site=True, detail=detail)
            for name, detail in DETAILS.items()
        ]

    def plan(self, training: Training) -> None:
        """Choose the layers."""
        found = [f"re:^{re.escape(name)}$" for name in blocks(training.module)]
        self._features.match = self._match if self._match is not None else found or None
        self._features.plan(training)

    def labels(self) -> Sequence[str]:
        """One per layer, in the order of the module."""
        return self._features.labels()

    def batch_begins(self, batch: Batch) -> None:
        """Start listening."""
        self._features.timed = self.timed
        self._features.batch_begins(batch)

    def batch_over(self) -> None:
        """Stop listening, and report failures."""
        self._features.batch_over()

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of this process's share of the layers; rows come from all processes."""
        readings = self._features.sample_over(team)
        owners = team.assign([float(reading.shape[1]) ** 3 for reading in readings])
        whole = team.gather([reading.parts for reading in readings], owners)
        return [self._of(reading, parts[0]) for reading, parts in zip(readings, whole, strict=True) if parts]

    def detach(self) -> None:
        """Stop listening and drop the rows."""
        self._features.detach()

    def _of(self, reading: Reading, sums: Tensor) -> Numbers:
        num_rows, width = reading.shape[-2:]
        plain, centred = (spectrum_of_rows(sums, num_rows=num_rows, centred=centred) for centred in (False, True))
        alpha, quality = power_law_exponent(_eigenvalues(centred, num_rows))
        rank_chance, alpha_chance = _chance(num_rows, width)
        values = {
            "effective_rank": effective_rank(plain),
            "centred_effective_rank": effective_rank(centred),
            "alpha": alpha,
            "alpha_fit": quality,
            **{"rows": sums.new_tensor(num_rows), "width": sums.new_tensor(width)},
            **{"effective_rank_chance": sums.new_tensor(rank_chance), "alpha_chance": sums.new_tensor(alpha_chance)},
        }
        return Numbers(reading.labels[0], {f"{self.name}_{name}": value for name, value in values.items()})


def _eigenvalues(spectrum: Spectrum, num_rows: int) -> Tensor:
    """Of the covariance, without the direction that taking the mean away has cost."""
    energies = spectrum.magnitudes.square()
    return energies[..., : max(1, num_rows - 1)]


@lru_cache(maxsize=1024)
def _chance(num_rows: int, width: int) -> tuple[float, float]:
    """Effective rank and exponent of Gaussian rows of that shape."""
    of_noise = null((num_rows, width))
    exponent, *_ = power_law_exponent(of_noise.magnitudes.square())
    # On the CPU: numpy may look at them where they are, which is no wait for the device.
    return float(np.from_dlpack(effective_rank(of_noise))), float(np.from_dlpack(exponent))
