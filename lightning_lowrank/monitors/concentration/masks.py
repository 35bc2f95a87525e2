"""Masks of the largest weights: the tickets that a training might be pruned to.

Masks of several densities are nested, so one small number per weight holds all of them: how many it belongs to.

Shape letters:  P weights
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import working_dtype


def memberships(
    magnitudes: Float[Tensor, " P"], densities: Sequence[float], ordered: Float[Tensor, " P"] | None = None
) -> UInt8[Tensor, " P"]:
    """How many of the masks each weight belongs to. A mask is of the largest weights, as many as its density says, and
    of those equal to the least of them; a weight of zero belongs to none.

    Args:
        ordered: The magnitudes in rising order, where they are known: sorting is what takes the time.
    """
    ordered = magnitudes.sort().values if ordered is None else ordered
    found = torch.zeros(len(magnitudes), dtype=torch.uint8, device=magnitudes.device)
    for density in densities:
        count = max(1, round(density * len(magnitudes)))
        found += (magnitudes >= ordered[len(magnitudes) - count]) & (magnitudes > 0)
    return found


def mask(found: UInt8[Tensor, " P"], place: int) -> Bool[Tensor, " P"]:
    """One of the masks, by its place among the densities in falling order, from 0 on."""
    return found > place


def hamming(first: Bool[Tensor, " P"], second: Bool[Tensor, " P"]) -> Float[Tensor, ""]:
    """Part of the weights that belong to just one of two masks."""
    return (first ^ second).count_nonzero().to(working_dtype(first.device)) / len(first)


def jaccard(first: Bool[Tensor, " P"], second: Bool[Tensor, " P"]) -> Float[Tensor, ""]:
    """Weights of both masks over those of one of them; NaN of empty masks."""
    return (first & second).count_nonzero() / (first | second).count_nonzero()


def hamming_chance(density: float) -> float:
    """Mean distance of two independent masks of a density."""
    return 2 * density * (1 - density)


def jaccard_chance(density: float) -> float:
    """Similarity of two independent masks of a density, of many weights."""
    return density / (2 - density)


def sparsity_at_energy(magnitudes: Float[Tensor, " P"], kept: float = 0.99) -> Float[Tensor, ""]:
    """Part of the weights that can go, smallest first, while so much of the squared norm is kept.

    Examples:
        >>> sparsity_at_energy(torch.tensor([10.0, 0.5, 0.5, 0.5]))
        tensor(0.7500, dtype=torch.float64)
    """
    return sparsity_of_ordered(magnitudes.sort().values, kept)


def sparsity_of_ordered(magnitudes: Float[Tensor, " P"], kept: float = 0.99) -> Float[Tensor, ""]:
    """The same for ascending magnitudes, without a sort."""
    energy = magnitudes.to(working_dtype(magnitudes.device)).square()
    gone = energy.cumsum(0) <= (1 - kept) * energy.sum()
    return torch.where(energy.sum() > 0, gone.to(energy).mean(), torch.nan)
