"""The lottery ticket that a training would be pruned to, and whether it still changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.monitors.concentration.inequality import gini_of_ordered
from lightning_lowrank.monitors.concentration.masks import (
    hamming,
    hamming_chance,
    jaccard,
    jaccard_chance,
    mask,
    memberships,
    sparsity_of_ordered,
)

# Weights that are looked at; of more as many are drawn, always the same.
MOST_WEIGHTS = 2**18

# Masks that are kept, spread over the run, so that there is always one of about half of its samples ago.
MOST_MASKS = 8

# Samples before which no mask is said to have settled.
EARLIEST = 4

# Distance to the first mask, over chance, below which there is nothing to settle: at half density one weight in a
# hundred.
LEAST_MOVED = 0.02

OF_WEIGHTS = ("weight_gini", "weight_sparsity_0.99")


class Tickets:
    """Masks of the largest weights at some densities, over all matrices together.

    Args:
        densities: Parts of the weights that stay.
        seed: Of the weights that are drawn in large models.
    """

    def __init__(self, densities: Sequence[float], *, seed: int) -> None:
        self._densities, self._seed = sorted(densities, reverse=True), seed
        # By the number of the sample.
        self._masks: dict[int, Tensor] = {}
        self._start: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Names of its quantities."""
        ends = (
            "hamming",
            "hamming_start",
            "hamming_chance",
            "jaccard",
            "jaccard_start",
            "jaccard_chance",
            "early_bird",
        )
        of_weights = [name + end for name in OF_WEIGHTS for end in ("", "_start")]
        return of_weights + [f"mask_{end}_{density:g}" for density in self._densities for end in ends]

    def compared(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """The masks of now against those before, and the first; then they are kept."""
        magnitudes = self._looked_at(weights)
        if not len(magnitudes):
            return {}
        # As whole numbers, whose order is that of positive floats: four times as fast.
        ordered = magnitudes.view(torch.int32).sort().values.view(torch.float32)
        # The NaN of a complex number may come first.
        new, sound = memberships(magnitudes, self._densities, ordered), (ordered[0] >= 0) & ordered[-1].isfinite()
        if not self._start or self._start["mask"].shape != new.shape:
            self._start, self._masks = {"mask": new, **_of_weights(ordered)}, {}
        found = _of_weights(ordered) | {f"{name}_start": self._start[name] for name in OF_WEIGHTS}
        for place, density in enumerate(self._densities):
            found |= self._of_density(new, place, density)
        self._keep(new, sound)
        return {name: torch.where(sound, value, torch.nan) for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, a byte for each weight looked at and each mask."""
        return {"masks": {str(sample): kept for sample, kept in self._masks.items()}, "start": dict(self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load them. An old format with a list of masks does not say at which steps they were taken."""
        masks, self._start = state.get("masks", {}), dict(state.get("start", {}))
        self._masks = {int(sample): kept for sample, kept in masks.items()} if isinstance(masks, Mapping) else {}

    @property
    def num_bytes(self) -> int:
        """Memory that masks take."""
        return sum(kept.nbytes for kept in [*self._masks.values(), *self._start.values()])

    def _of_density(self, new: Tensor, place: int, density: float) -> dict[str, Tensor]:
        now, first = mask(new, place), mask(self._start["mask"].to(new.device), place)
        since_start, chance = hamming(now, first), hamming_chance(density)
        constants = {"hamming_chance": chance, "jaccard_chance": jaccard_chance(density)}
        found = {"hamming_start": since_start, "jaccard_start": jaccard(now, first)}
        found |= {name: now.new_tensor(value, dtype=torch.float32) for name, value in constants.items()}
        sample = self._sample
        if sample > 0:
            last = mask(self._masks[sample - 1].to(new.device), place)
            found |= {"hamming": hamming(now, last), "jaccard": jaccard(now, last)}
        if sample >= EARLIEST:
            halfway = max(kept for kept in self._masks if 2 * kept <= sample)
            later = [mask(row.to(new.device), place) for kept, row in self._masks.items() if kept >= halfway]
            since_halfway = torch.stack([hamming(now, one) for one in later]).max()
            found["early_bird"] = torch.where(
                since_start > LEAST_MOVED * chance, since_halfway / since_start, torch.nan
            )
        return {f"mask_{name}_{density:g}": value for name, value in found.items()}

    @property
    def _sample(self) -> int:
        """Number of the sample in the making."""
        return max(self._masks, default=-1) + 1

    def _keep(self, new: Tensor, sound: Tensor) -> None:
        """The newest mask, and of those before some that are evenly spread. Of weights that are not finite the last
        mask stays.
        """
        sample = self._sample
        last = self._masks[sample - 1].to(new.device) if sample else new
        apart = 2 ** (sample // MOST_MASKS).bit_length()
        self._masks = {kept: row for kept, row in self._masks.items() if kept % apart == 0} | {
            sample: torch.where(sound, new, last)
        }

    def _looked_at(self, weights: Sequence[Tensor]) -> Float[Tensor, " P"]:
        """Magnitudes of all entries; of more than `MOST_WEIGHTS` those at so many places, the same at every sample."""
        flat = [weight.detach().reshape(-1) for weight in weights]
        total = sum(map(len, flat))
        if total > MOST_WEIGHTS:
            draws = torch.Generator().manual_seed(self._seed)
            sizes = [-(-len(row) * MOST_WEIGHTS // total) for row in flat]
            flat = [row[_places(len(row), size, draws).to(row.device)] for row, size in zip(flat, sizes, strict=True)]
        return torch.cat([row.abs().float() for row in flat]) if flat else torch.empty(0)


def _places(length: int, size: int, draws: torch.Generator) -> Tensor:
    return torch.randint(length, (size,), generator=draws)


def _of_weights(ordered: Float[Tensor, " P"]) -> dict[str, Tensor]:
    return {"weight_gini": gini_of_ordered(ordered), "weight_sparsity_0.99": sparsity_of_ordered(ordered)}
