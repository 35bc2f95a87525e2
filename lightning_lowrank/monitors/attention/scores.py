"""Statistics of rows of the scores in a call of attention, for some of its queries and each head.

Shape letters:  B sequences   H heads of queries   G heads of keys   L queries   S keys   D columns that a head compares
b, l sequences and queries that are drawn
"""

from dataclasses import dataclass
from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

# A score that is no larger belongs to a key that a mask has closed: masks add -inf, the least number or -1e4.
CLOSED = -5e3
# What is added up over rows: they themselves, and by row entropy, its largest value, the sink's share, its even share.
ROWS, ENTROPY, ENTROPY_CHANCE, SINK, SINK_CHANCE = range(5)


@dataclass(frozen=True)
class Draw:
    """Which rows of a call are looked at.

    Attributes:
        num_rows: How many for each head, at most.
        generator: Of the CPU.
    """

    num_rows: int
    generator: torch.Generator

    def __call__(self, batch: int, queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Numbers of sequences, and of queries in each of them: about as many of both."""
        sequences = min(batch, max(isqrt(self.num_rows), -(-self.num_rows // queries)))
        drawn = (self._some(batch, sequences), self._some(queries, min(queries, max(1, self.num_rows // sequences))))
        first, second = (numbers.to(device, non_blocking=True) for numbers in drawn)
        return first, second

    def _some(self, of: int, count: int) -> Tensor:
        return torch.randperm(of, generator=self.generator, device="cpu")[:count].sort().values


def of_product(
    draw: Draw,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "b H l S"]:
    """Scores of some queries in a call of `scaled_dot_product_attention` with these arguments, before dropout.

    Raises:
        ValueError: They are no plain tensors of up to four axes.
    """
    _refuse_odd(query, key, attn_mask)
    batch, heads, queries, keys = max(query.shape[0], key.shape[0]), query.shape[-3], query.shape[-2], key.shape[-2]
    sequences, rows = draw(batch, queries, query.device)
    q = query.expand(batch, -1, -1, -1).index_select(0, sequences).index_select(2, rows).float()
    k = key.expand(batch, -1, -1, -1).index_select(0, sequences).float()
    if k.shape[1] != heads:
        k = k.repeat_interleave(heads // k.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        mask = attn_mask.expand(batch, heads, queries, keys).index_select(0, sequences).index_select(2, rows)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if is_causal:
        scores = scores.masked_fill(torch.arange(keys, device=rows.device) > rows[:, None], -torch.inf)
    return scores


def of_softmax(draw: Draw, scores: Tensor) -> Float[Tensor, "b H l S"]:
    """Some rows of the scores that eager attention turns into shares: masked, scaled, before dropout."""
    _refuse_odd(scores, scores, None)
    sequences, rows = draw(scores.shape[0], scores.shape[-2], scores.device)
    return scores.index_select(0, sequences).index_select(2, rows).float()


def sums_of(scores: Float[Tensor, "b H l S"]) -> tuple[Float[Tensor, "5 H"], Float[Tensor, " H"]]:
    """Over rows with a key that is open: see `ROWS` and what follows; and the largest score of each head."""
    closed = scores <= CLOSED
    alive = ~closed.all(-1)
    logs = scores.masked_fill(closed, -torch.inf).log_softmax(-1)
    shares = logs.exp()
    num_open = (~closed).sum(-1)
    by_row = torch.stack(
        [
            alive.to(scores),
            -(shares * logs.masked_fill(closed, 0.0)).sum(-1),
            num_open.to(scores).log(),
            shares[..., 0],
            (~closed[..., 0]) / num_open,
        ]
    )
    tops = scores.masked_fill(closed, -torch.inf).amax((0, 2, 3))
    return by_row.masked_fill(~alive, 0.0).sum((1, 3)), tops


def _refuse_odd(query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    """Of what has no rows that can be taken out one by one."""
    for tensor in (query, key, *([] if mask is None else [mask])):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise ValueError(f"a call of attention has a {type(tensor).__name__} without rows")
    if query.ndim != 4 or key.ndim != 4 or query.shape[1] % key.shape[1] or 0 in (*query.shape, *key.shape):
        raise ValueError(f"a call of attention has queries of shape {tuple(query.shape)}, keys {tuple(key.shape)}")
