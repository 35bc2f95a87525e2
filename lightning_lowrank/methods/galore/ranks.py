"""Ranks of matrices: given, or measured with the first gradients."""

from collections.abc import Mapping, Sequence
from math import ceil, isfinite
from numbers import Integral
from typing import Literal

from torch import Tensor, nn

from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.methods.galore.bases import Projection
from lightning_lowrank.models.names import chosen_parameters
from lightning_lowrank.statistics.energy_rank import energy_rank

# The whole number first: LightningCLI takes the first that fits.
Rank = int | float | Literal["measured"]
Side = Literal["auto", "left", "right", "both"]

# Of "measured": gradients that it looks at, share of the short side that it begins with and never exceeds, and parts of
# the short side that it rounds up to.
SAMPLES, LARGEST, PARTS = 3, 0.25, 32


def refuse_rank(rank: Rank) -> None:
    """Refuse a rank that is out of range.

    Raises:
        ValueError: It is out of range.
    """
    if rank == "measured":
        return
    if isinstance(rank, str) or (rank < 1 if isinstance(rank, Integral) else not 0 < rank <= 1):
        raise ValueError(
            f"rank={rank!r} must be a share of the short side above 0 and at most 1, a whole number of at least 1, "
            "or 'measured'"
        )


def ranks_by_tag(module: nn.Module, rank: Rank | Mapping[str, Rank], tags: Sequence[str]) -> dict[str, Rank]:
    """The rank of each parameter; of several matching patterns, the first counts."""
    if not isinstance(rank, Mapping):
        return dict.fromkeys(tags, rank)
    fitting = [(dict.fromkeys(chosen_parameters(module, pattern, None), one)) for pattern, one in rank.items()]
    return {tag: one for ranks in reversed(fitting) for tag, one in ranks.items()}


def is_full(shape: tuple[int, int], rank: Rank) -> bool:
    """Whether a whole number leaves nothing out, so that no state is saved; a share of 1.0 is meant so."""
    return isinstance(rank, Integral) and int(rank) >= min(shape)


def projection_of(side: Side, shape: tuple[int, int], rank: Rank) -> Projection:
    """The projection of a matrix of a shape; the first one if its rank is to be measured."""
    short = min(shape)
    share = LARGEST if isinstance(rank, str) else rank
    size = min(share, short) if isinstance(share, Integral) else max(1, round(share * short))
    left = side in ("left", "both") or (side == "auto" and shape[0] < shape[1])
    right = side in ("right", "both") or (side == "auto" and shape[0] >= shape[1])
    return Projection(int(size), left, right)


def energy_rank_of(gradient: Tensor) -> float:
    """The number that `RankMonitor` computes for it."""
    return float(energy_rank(decompose([gradient], "values").spectra[0]))


def measured_rank(samples: Sequence[float], short: int, largest: int) -> int:
    """The largest energy rank of some gradients, rounded up to a multiple of a part of the short side, and capped.

    Args:
        samples: Energy ranks; NaN for a gradient that could not be decomposed.
        short: The short side.
        largest: The cap.
    """
    part = max(1, short // PARTS)
    known = [sample for sample in samples if isfinite(sample)]
    return min(largest, part * ceil(max(known) / part)) if known else largest
