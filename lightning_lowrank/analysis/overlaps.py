"""Masks of two checkpoints: which weights are the largest in both, compared with chance."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_lowrank.analysis.matrices import Place
from lightning_lowrank.models.checkpoints import Checkpoint


@dataclass(frozen=True)
class Overlap:
    """Similarity of the masks of one tensor.

    Attributes:
        name: Name of the tensor.
        densities: Shares of its weights that the masks of A and B keep.
        jaccard: Number of weights in both masks divided by that in either; 1 if both are empty.
        chance: The expected value of `jaccard` for independent masks of these densities.
        hamming: Share of the weights that are in exactly one mask.
        hamming_chance: Its expected value for independent masks.
    """

    name: str
    densities: tuple[float, float]
    jaccard: float
    chance: float
    hamming: float
    hamming_chance: float


def overlaps(
    a: Checkpoint,
    b: Checkpoint,
    found: Mapping[str, Place],
    density: float | None = None,
    scope: Literal["global", "layer"] = "global",
) -> Iterator[Overlap]:
    """The masks of two checkpoints, tensor by tensor.

    Args:
        found: Places that both checkpoints have, by name.
        density: The masks keep this part of the weights, the largest; unless given, those that are not zero.
        scope: Whether the share is taken of all weights together, which holds all magnitudes in memory, or of each
            tensor.

    Raises:
        ValueError: The density is out of range, or weights are not finite.
    """
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density={density} must be above 0 and at most 1")
    for checkpoint in (a, b):
        checkpoint.refuse_infinite(
            (n for place in found.values() for n in place.names), "leave them out with --exclude"
        )
    everywhere = [_threshold(c, found, density) if density and scope == "global" else None for c in (a, b)]
    for name, place in found.items():
        one, other = (
            _mask(torch.cat([m.flatten() for _, m in place.matrices(c)]).abs(), density, limit)
            for c, limit in zip((a, b), everywhere, strict=True)
        )
        p, q = one.double().mean().item(), other.double().mean().item()
        either = (one | other).sum().item()
        yield Overlap(
            name,
            (p, q),
            (one & other).sum().item() / either if either else 1.0,
            p * q / (p + q - p * q) if p + q else 1.0,
            (one ^ other).double().mean().item(),
            p + q - 2 * p * q,
        )


def _threshold(checkpoint: Checkpoint, found: Mapping[str, Place], density: float) -> float:
    """The least magnitude that a mask of all weights keeps."""
    magnitudes = torch.cat([m.flatten().abs() for place in found.values() for _, m in place.matrices(checkpoint)])
    return _least(magnitudes, density)


def _mask(magnitudes: Tensor, density: float | None, limit: float | None) -> Tensor:
    if density is None:
        return magnitudes > 0
    least = _least(magnitudes, density) if limit is None else limit
    return (magnitudes >= least) & (magnitudes > 0)


def _least(magnitudes: Tensor, density: float) -> float:
    kept = max(1, round(density * len(magnitudes)))
    return float(magnitudes.kthvalue(len(magnitudes) - kept + 1).values)
