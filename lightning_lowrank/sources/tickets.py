"""The lottery ticket that a training would be pruned to, and whether it still changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.inequality import gini
from lightning_lowrank.masks import hamming, hamming_chance, jaccard, jaccard_chance, mask, memberships, sparsity_at_energy

# Weights that are looked at; of more as many are drawn, always the same.
MOST_WEIGHTS = 2**18

# Masks that the newest is held against (You et al. 2020).
EARLIER = 4

OF_WEIGHTS = ("weight_gini", "weight_sparsity_0.99")


class Tickets:
    """Masks of the largest weights at some densities, over all matrices together.

    Args:
        densities: Parts of the weights that stay.
        seed: Of the weights that are drawn in large models.
    """

    def __init__(self, densities: Sequence[float], *, seed: int) -> None:
        self._densities, self._seed = sorted(densities, reverse=True), seed
        self._masks: list[Tensor] = []
        self._start: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Of what it gives."""
        ends = ("hamming", "hamming_start", "hamming_chance", "jaccard", "jaccard_start", "jaccard_chance", "early_bird")
        of_weights = [name + end for name in OF_WEIGHTS for end in ("", "_start")]
        return of_weights + [f"mask_{end}_{density:g}" for density in self._densities for end in ends]

    def compared(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """The masks of now against those before, and the first; then they are kept."""
        magnitudes = self._looked_at(weights)
        if not len(magnitudes):
            return {}
        new, sound = memberships(magnitudes, self._densities), magnitudes.isfinite().all()
        if not self._start or self._start["mask"].shape != new.shape:
            self._start, self._masks = {"mask": new, **_of_weights(magnitudes)}, []
        found = _of_weights(magnitudes) | {f"{name}_start": self._start[name] for name in OF_WEIGHTS}
        for place, density in enumerate(self._densities):
            found |= self._of_density(new, place, density)
        self._masks = [new, *self._masks[:EARLIER]][:EARLIER]
        return {name: torch.where(sound, value, torch.nan) for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, a byte for each weight looked at and each mask."""
        return {"masks": list(self._masks), "start": dict(self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._masks, self._start = list(state.get("masks", [])), dict(state.get("start", {}))

    @property
    def num_bytes(self) -> int:
        """Memory that masks take."""
        return sum(kept.nbytes for kept in [*self._masks, *self._start.values()])

    def _of_density(self, new: Tensor, place: int, density: float) -> dict[str, Tensor]:
        now, first = mask(new, place), mask(self._start["mask"].to(new.device), place)
        before = [mask(kept.to(new.device), place) for kept in self._masks]
        apart, chance = [hamming(now, one) for one in before], hamming_chance(density)
        constants = {"hamming_chance": chance, "jaccard_chance": jaccard_chance(density)}
        found = {"hamming_start": hamming(now, first), "jaccard_start": jaccard(now, first)}
        found |= {name: now.new_tensor(value, dtype=torch.float32) for name, value in constants.items()}
        if before:
            found |= {"hamming": apart[0], "jaccard": jaccard(now, before[0])}
        if len(before) == EARLIER:
            found["early_bird"] = torch.stack(apart).max() / chance
        return {f"mask_{name}_{density:g}": value for name, value in found.items()}

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


def _of_weights(magnitudes: Float[Tensor, " P"]) -> dict[str, Tensor]:
    return {"weight_gini": gini(magnitudes), "weight_sparsity_0.99": sparsity_at_energy(magnitudes)}
