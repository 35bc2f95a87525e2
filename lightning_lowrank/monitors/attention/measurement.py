"""Numbers of heads: ranks of what one step adds to `Wq' Wk`, beside random ones; statistics of rows of scores.

Shape letters:  A attentions   P processes   H heads, of one attention or of all   D columns that a head compares   N, M
inputs of queries and of keys
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.attention_circuits import circuit_updates
from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.models.attention import Attention
from lightning_lowrank.monitors.attention.scores import ENTROPY, ENTROPY_CHANCE, ROWS, SINK, SINK_CHANCE
from lightning_lowrank.statistics.effective_rank_energy import effective_rank_energy
from lightning_lowrank.statistics.stable_rank import stable_rank

UPDATES = ("qk_update", "qk_update_second_order")
RANKS: dict[str, Callable[[Spectrum], Tensor]] = {
    "effective_rank_energy": effective_rank_energy,
    "stable_rank": stable_rank,
}
# Heads of Gaussian matrices whose mean is the null.
DRAWS = 8
# Bytes of tall matrices, in double precision, that are factored at once.
WORKSPACE = 2**27

# Of each attention its weights of queries and of keys by head, and what the step adds to both.
Parts = tuple[Tensor, Tensor, Tensor, Tensor]
ByHead = dict[str, dict[str, Tensor]]


def ranks_of(parts: Mapping[Attention, Parts]) -> ByHead:
    """Ranks of all heads, with those of random matrices, in one batch of eigenproblems."""
    batches = list(_batches(parts))
    small = [core for some in batches for core in circuit_updates(*_stacked([parts[one] for one in some]))]
    spectra = decompose(small, "values").spectra
    found: ByHead = {}
    for some, pair in zip(batches, zip(spectra[::2], spectra[1::2], strict=True), strict=True):
        queries, keys = parts[some[0]][:2]
        rows = _rows(pair)
        chance = _chance(queries.shape[-2], queries.shape[-1], keys.shape[-1])
        rows |= {f"{name}_chance": chance[name].to(row).expand_as(row) for name, row in rows.items()}
        columns = torch.stack([row.flatten() for row in rows.values()]).unbind(-1)
        for label, column in zip((label for one in some for label in one.labels), columns, strict=True):
            found[label] = dict(zip(rows, column.unbind(), strict=True))
    return found


def _stacked(parts: Sequence[Parts]) -> Iterator[Tensor]:
    return map(torch.stack, zip(*parts, strict=True))


def _batches(parts: Mapping[Attention, Parts]) -> Iterator[list[Attention]]:
    """Attentions of one shape, as many at once as there is room for."""
    alike: dict[tuple[torch.Size, ...], list[Attention]] = defaultdict(list)
    for one, tensors in parts.items():
        alike[tuple(tensor.shape for tensor in tensors)].append(one)
    for shapes, some in alike.items():
        many = max(1, WORKSPACE // max(1, 8 * sum(shape.numel() for shape in shapes)))
        yield from (some[i : i + many] for i in range(0, len(some), many))


def _rows(pair: Sequence[Spectrum]) -> dict[str, Tensor]:
    return {
        f"{update}_{name}": rank(spectrum)
        for update, spectrum in zip(UPDATES, pair, strict=True)
        for name, rank in RANKS.items()
    }


@lru_cache(maxsize=1024)
def _chance(width: int, inputs: int, others: int) -> dict[str, Tensor]:
    """Means over heads whose weights and updates are Gaussian, those of queries as large as those of keys."""
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = [(DRAWS, width, inputs), (DRAWS, width, others)] * 2
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
    rows = _rows(decompose(circuit_updates(*drawn), "values").spectra)
    return {name: row.mean() for name, row in rows.items()}


def scores_of(found: Float[Tensor, "P 6 H"]) -> tuple[dict[str, Float[Tensor, " H"]], Float[Tensor, ""]]:
    """Statistics of the scores of all heads, and the largest score of all; NaN without rows.

    Args:
        found: Of each process the sums over rows, and the largest score.
    """
    sums = found[:, :5].sum(0)
    there = found[:, ROWS] > 0
    tops = torch.where(there, found[:, 5], -torch.inf).amax(0)
    heard = sums[ROWS] > 0
    means = torch.where(heard, sums / sums[ROWS], torch.nan)
    values = {
        "attention_max_logit": torch.where(heard, tops, torch.nan),
        "attention_entropy": means[ENTROPY],
        "attention_sink_share": means[SINK],
        "attention_entropy_chance": means[ENTROPY_CHANCE],
        "attention_sink_share_chance": means[SINK_CHANCE],
        "attention_rows": sums[ROWS],
    }
    return values, torch.where(heard.any(), tops.amax(), torch.nan)
