"""Scaling of a weight matrix at radii that are quantiles of its own entries: neither their scale nor a choice of
distance matters.

Shape letters:  B any batch axes   S nodes (rows)   N their fan-out (columns)   R radii   C cells of H histograms
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from lightning_lowrank.maths.scaling.boxes import counts, magnitudes
from lightning_lowrank.maths.scaling.scaling import ORDERS, Scaling
from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype

# With fewer columns no radius holds both many entries and a small part of them.
FEWEST_COLUMNS = 32

# A float32 that is not negative is 31 bits in the order of its value: the upper ones name a bin, the lower ones a place
# in it.
LOW = 13
BINS, PLACES = 2 ** (31 - LOW), 2**LOW

# Entries that are copied at once; and those that are worked on at once, so that they stay in the cache.
CHUNK, PIECE = 2**22, 2**18

Pieces = Callable[[], Iterator[Tensor]]


def rank_scaling(
    weights: Num[Tensor, "*B S N"],
    *,
    num_radii: int = 24,
    min_count: int = 8,
    max_share: float = 0.5,
    orders: Sequence[float] = ORDERS,
) -> Scaling:
    """How many of its weights each row has among the largest 1 %, 2 %, ... of the matrix, and how the moments of that
    number scale.

    The radii are entries of the matrix, and masses are compared with their own mean. So only the order of the
    magnitudes matters, and every distance that falls with |w| gives the same result. The dimension of order 2 is 1 by
    construction. Weights drawn independently, from any distribution, give `tau = q` except for counting noise, which is
    known exactly (`noise`).

    A row of zeros does not count. There is no scaling (NaN) for less than 32 columns, or if more than half of the
    entries of other rows are zero. The same holds for fewer than five radii of different length (constant or ternary
    matrices). Magnitudes are compared in float32.

    Args:
        weights: Rows are nodes, columns their connections. A matrix with NaN or Inf gives NaN and does not affect the
            rest of its batch.
        num_radii: Number of radii, at shares of the entries that are evenly spaced in their logarithm.
        min_count: Mean number of entries of a row within the smallest radius.
        max_share: Share of the entries within the largest radius.
        orders: Values of q at which vectors are evaluated.
    """
    nodes, columns = weights.shape[-2:]
    flat = weights.reshape(math.prod(weights.shape[:-2]), nodes, columns)
    every = torch.arange(nodes, device=weights.device)
    with full_precision(weights.device):
        shares = _shares(columns, weights.device, num_radii, min_count, max_share)
        masses = torch.zeros(len(flat), nodes, num_radii, dtype=working_dtype(weights.device), device=weights.device)
        radii = torch.zeros(len(flat), num_radii, device=weights.device)
        for matrix, table, row in zip(flat, masses, radii, strict=True):
            if matrix.numel():
                _fill(matrix, every, columns, shares, table, row, _alone)
        masses = masses.reshape(*weights.shape[:-1], num_radii)
        return _scaled(masses, radii.reshape(*weights.shape[:-2], num_radii), columns, orders)


def rank_scaling_in_parts(
    part: Num[Tensor, "_ _"],
    nodes: Int[Tensor, " _"],
    shape: tuple[int, int],
    all_reduce: Callable[[Tensor], Tensor],
) -> Scaling:
    """The same for a matrix that is distributed over several processes. The result is exactly the same, since counts
    are summed.

    Each adds up two histograms, of 1 MB and 0.8 MB, and the table of the masses; no process ever has more of the matrix
    than before.

    Args:
        part: Entries that this process has, of some rows and some columns; each entry of the matrix is on one process.
        nodes: Numbers of these rows in the whole matrix.
        shape: Of the whole matrix.
        all_reduce: Adds up over all processes. All of them have to come here.
    """
    device = part.device
    with full_precision(device):
        shares = _shares(shape[1], device)
        masses = torch.zeros(shape[0], len(shares), dtype=working_dtype(device), device=device)
        radii = torch.zeros_like(shares)
        mine = part if part.numel() else part.new_empty(0, 1)
        _fill(mine, nodes[: len(mine)], shape[1], shares, masses, radii, all_reduce)
        return _scaled(masses, radii, shape[1], ORDERS)


def _shares(
    columns: int, device: torch.device, num_radii: int = 24, min_count: int = 8, max_share: float = 0.5
) -> Float[Tensor, " R"]:
    least = min(min_count / max(columns, 1), max_share)
    return torch.logspace(math.log10(least), math.log10(max_share), num_radii, dtype=torch.float32, device=device)


def _scaled(
    masses: Float[Tensor, "*B S R"], radii: Float[Tensor, "*B R"], columns: int, orders: Sequence[float]
) -> Scaling:
    return Scaling(
        masses, _usable(radii, columns).to(masses), noise=_binomial_noise(masses, columns), orders=tuple(orders)
    )


def _alone(counts: Tensor) -> Tensor:
    """The sum over all processes, where there is one."""
    return counts


def _fill(
    part: Num[Tensor, "s _"],
    nodes: Int[Tensor, " s"],
    columns: int,
    shares: Float[Tensor, " R"],
    masses: Float[Tensor, "S R"],
    radii: Float[Tensor, " R"],
    all_reduce: Callable[[Tensor], Tensor],
) -> None:
    """Masses and radii of a matrix, from the part of it whose rows are some of the nodes."""
    pieces = _magnitudes(part)
    tops = torch.cat([piece.amax(-1) for piece in pieces()])
    marks = masses.new_zeros(len(masses) + 1)
    marks[nodes], marks[-1] = (tops > 0).to(marks), (~torch.isfinite(tops)).any().to(marks)
    marks = all_reduce(marks)
    live, lost = marks[:-1] > 0, marks[-1] > 0
    ranks = (shares * (columns * live.sum())).ceil().long().clamp(min=1)
    radii.copy_(largest(pieces, ranks, all_reduce))
    for rows, piece in zip(nodes.split(_rows(part)), pieces(), strict=True):
        if len(rows):
            masses[rows] = counts(piece, radii, torch.ge)
    masses.copy_(1 + all_reduce(masses)).masked_fill_(~live[:, None], 0.0).masked_fill_(lost, torch.nan)


def _rows(matrix: Num[Tensor, "S N"]) -> int:
    """So many are worked on at once."""
    return max(1, PIECE // matrix.shape[1])


def _magnitudes(matrix: Num[Tensor, "S N"]) -> Pieces:
    """A few rows at a time in float32; a matrix larger than a chunk is never copied whole."""
    step = _rows(matrix)
    if matrix.numel() > CHUNK:
        return lambda: (magnitudes(piece, torch.float32).contiguous() for piece in matrix.split(step))
    whole = magnitudes(matrix, torch.float32).contiguous()
    return lambda: iter(whole.split(step))


def _usable(radii: Float[Tensor, "*B R"], columns: int) -> Bool[Tensor, "*B R"]:
    """Each radius once; none where the largest share reaches down to weights that are not there."""
    new = torch.cat([torch.ones_like(radii[..., :1], dtype=torch.bool), radii[..., 1:] < radii[..., :-1]], -1)
    return new & (radii[..., -1:] > 0) & (columns >= FEWEST_COLUMNS)


def _binomial_noise(masses: Float[Tensor, "*B S R"], columns: int) -> Float[Tensor, "*B R"]:
    """Variance of ln(1 + n) of a binomial n that has the mean of the counts: what rows of independent weights have."""
    live = masses[..., -1:] > 0
    share = (torch.where(live, masses - 1, 0.0).sum(-2) / live.sum(-2) / max(columns, 1))[..., None]
    count = torch.arange(columns + 1, dtype=masses.dtype, device=masses.device)
    choices = -torch.lgamma(count + 1) - torch.lgamma(columns - count + 1)
    chances = torch.softmax(choices + torch.xlogy(count, share) + torch.xlogy(columns - count, 1 - share), -1)
    logs = (1 + count).log()
    return (chances * (logs - (chances * logs).sum(-1, keepdim=True)).square()).sum(-1)


def largest(
    pieces: Pieces, ranks: Int[Tensor, " R"], all_reduce: Callable[[Tensor], Tensor] = _alone
) -> Float[Tensor, " R"]:
    """Entries of given rank, 1 for the largest: exactly, by histograms, in a tenth of the time of sorting.

    Args:
        pieces: Give all entries, in float32 and not negative, at each call.
        ranks: From 1 to the number of entries.
        all_reduce: Adds up over all processes, where the entries are on several.
    """
    wanted, device = len(ranks), ranks.device
    in_bins = all_reduce(_histogram((bits >> LOW for bits in _bits(pieces)), BINS, device))
    bins, above = _find(in_bins[None], ranks[None])
    # Bins that hold a wanted entry have rows for their places; entries of all others go to the last row.
    row = torch.full((BINS,), wanted * PLACES, dtype=torch.int32, device=device)
    row[bins[0]] = torch.arange(wanted, dtype=torch.int32, device=device) * PLACES
    addresses = (row.index_select(0, bits >> LOW) + (bits & (PLACES - 1)) for bits in _bits(pieces))
    in_places = all_reduce(_histogram(addresses, (wanted + 1) * PLACES, device)).view(wanted + 1, PLACES)
    places, _ = _find(in_places[row[bins[0]] // PLACES], (ranks - above[0])[:, None])
    found: Tensor = (bins[0] * PLACES + places[:, 0]).int()
    return found.view(torch.float32)


def _bits(pieces: Pieces) -> Iterator[Int[Tensor, " _"]]:
    return (piece.view(torch.int32).flatten() for piece in pieces())


def _histogram(parts: Iterable[Int[Tensor, " _"]], size: int, device: torch.device) -> Int[Tensor, " _"]:
    found = torch.zeros(size, dtype=torch.int32, device=device)
    one = torch.ones((), dtype=torch.int32, device=device)
    for part in parts:
        found.index_add_(0, part, one.expand(len(part)))
    return found


def _find(histograms: Int[Tensor, "H C"], ranks: Int[Tensor, "H R"]) -> tuple[Int[Tensor, "H R"], Int[Tensor, "H R"]]:
    """The cell that holds the entry of each rank, 1 for that in the highest cell, and how many entries lie in cells
    above it.
    """
    reached = histograms.cumsum(-1, dtype=torch.int32)
    cell = torch.searchsorted(reached, (reached[:, -1:] - ranks + 1).int()).clamp(max=histograms.shape[-1] - 1)
    return cell, reached[:, -1:] - reached.gather(-1, cell)
