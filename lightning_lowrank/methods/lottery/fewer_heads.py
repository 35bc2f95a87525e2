"""torch's attention with fewer heads than its width allows.

Shape letters:  B examples   L queries   S keys   E width   H heads   D width of a head
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class FewerHeads(nn.MultiheadAttention):
    """`nn.MultiheadAttention` without some of its heads: `in_proj_weight` is `[3 H D, E]`, and H D is less than E.

    It is called like the class that it replaces. Mean attention weights are over the remaining heads. It is never
    constructed directly: `take_heads` converts an attention.
    """

    all_heads: int
    kept: Tensor

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Like that of `nn.MultiheadAttention`. There, `is_causal` is a hint besides a mask; here it has no effect."""
        alone = query.dim() == 2
        inputs = [_batch_first(one, alone, self.batch_first) for one in (query, key, value)]
        q, k, v = (self._heads(part, one) for part, one in enumerate(inputs))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if attn_mask is not None:
            scores = scores + self._of_heads(_added(attn_mask, q), len(q))
        if key_padding_mask is not None:
            padding = key_padding_mask[None] if alone else key_padding_mask
            scores = scores + _added(padding, q)[:, None, None]
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        found = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        found = found[0] if alone else found if self.batch_first else found.transpose(0, 1)
        if not need_weights:
            return found, None
        told = weights.mean(1) if average_attn_weights else weights
        return found, told[0] if alone else told

    def _heads(self, part: int, x: Float[Tensor, "B S E"]) -> Float[Tensor, "B H S D"]:
        """Queries, keys or values."""
        bias = self.in_proj_bias
        made = F.linear(x, self.in_proj_weight.chunk(3)[part], None if bias is None else bias.chunk(3)[part])
        heads: Tensor = made.unflatten(-1, (self.num_heads, -1))
        return heads.transpose(1, 2)

    def _of_heads(self, mask: Tensor, examples: int) -> Tensor:
        """Of a mask for each head, those that are left."""
        if mask.dim() == 2:
            return mask
        by_head: Tensor = mask.unflatten(0, (examples, self.all_heads))
        return by_head[:, self.kept.to(mask.device)]


def can_lose_heads(layer: nn.Module) -> bool:
    """Whether it is torch's attention with one weight for queries, keys and values, and without additions to keys."""
    if type(layer) not in (nn.MultiheadAttention, FewerHeads):
        return False
    attention: Any = layer
    return attention.in_proj_weight is not None and attention.bias_k is None and not attention.add_zero_attn


def take_heads(layer: nn.MultiheadAttention, kept: Tensor) -> None:
    """Convert an attention whose weights are already cut to one with the remaining heads."""
    before = layer.kept if isinstance(layer, FewerHeads) else torch.arange(layer.num_heads)
    if not isinstance(layer, FewerHeads):
        layer.all_heads = layer.num_heads
    layer.__class__ = FewerHeads
    layer.kept, layer.num_heads = before[kept], len(kept)
    # The fast path of `nn.TransformerEncoderLayer` would read the weights as those of the whole width.
    layer._qkv_same_embed_dim = False


def _batch_first(x: Tensor, alone: bool, batch_first: bool) -> Float[Tensor, "B S E"]:
    return x[None] if alone else x if batch_first else x.transpose(0, 1)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to scores: masks that say True where nothing is looked at become -inf there."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
