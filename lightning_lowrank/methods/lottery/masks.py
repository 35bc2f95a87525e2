"""Masks by magnitude: which weights stay.

Shape letters:  P weights
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Scope = Literal["global", "layer"]


def kept(total: int, prune: float, rounds: int) -> int:
    """The number of entries that stay after some prunings; at least one.

    Examples:
        >>> kept(1000, 0.2, 5)
        328
    """
    return max(1, round(total * (1 - prune) ** rounds))


def largest(scores: Float[Tensor, " P"], count: int) -> Bool[Tensor, " P"]:
    """The mask of the largest scores; among equal scores, the first stay."""
    order = scores.argsort(descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, order[:count], True)


def pruned(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    prune: float,
    rounds: int,
    scope: Scope,
    *,
    one_each: bool = False,
) -> list[Tensor]:
    """Masks of the largest remaining weights, after a number of prunings in total.

    Args:
        weights: Weights by layer, or other tensors of scores.
        masks: Masks of earlier prunings; None for none.
        prune: Share of the remaining entries that each pruning removes.
        rounds: Number of prunings, including this one.
        scope: Compare magnitudes over all layers, or within each layer.
        one_each: Keep the largest entry of each layer.
    """
    scores = [_scores(weight, mask) for weight, mask in zip(weights, masks, strict=True)]
    if scope == "layer":
        found = [largest(row, kept(len(row), prune, rounds)) for row in scores]
    else:
        if one_each:
            scores = [row.index_fill(0, row.argmax(), torch.inf) for row in scores]
        every = torch.cat([row.to(scores[0].device) for row in scores])
        count = max(kept(len(every), prune, rounds), one_each * len(scores))
        found = list(largest(every, count).split([len(row) for row in scores]))
    return [mask.view(weight.shape).to(weight.device) for mask, weight in zip(found, weights, strict=True)]


def _scores(weight: Tensor, mask: Tensor | None) -> Float[Tensor, " P"]:
    """Magnitudes, below all of them where a weight is gone: masks are nested."""
    magnitudes = weight.detach().abs().float()
    return (magnitudes if mask is None else magnitudes.masked_fill(~mask, -1.0)).flatten()
