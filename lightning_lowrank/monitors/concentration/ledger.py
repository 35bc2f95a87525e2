"""Sums of the signals of units, sample by sample, and their inequality."""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.models.checkpoints import loaded
from lightning_lowrank.monitors.concentration.inequality import (
    entropy,
    gini,
    hill_exponent,
    matthew_slope,
    participation_ratio,
    rank_persistence,
    top_overlap,
    top_overlap_chance,
    top_share,
)

# By the name of the part; its units in order.
Rows = Mapping[str, Tensor]

INEQUALITY: dict[str, Callable[[Tensor], Tensor]] = {
    "gini": gini,
    "top_share": top_share,
    "participation_ratio": participation_ratio,
    "entropy": entropy,
    "hill_exponent": hill_exponent,
}
GROWTH = ("matthew_slope", "rank_persistence")
OF_THE_START = ("overlap_start", "overlap_chance")
OF_A_REFERENCE = ("overlap_reference", "rank_reference")

# Of a sample, in the running mean that is held against a reference.
WEIGHT = 0.1


class Ledger:
    """The accounts of one signal of one kind of units.

    Attributes:
        sums: All samples so far.
        start: The first sample in which all units of a part were finite.
        recent: Mean of the last ten samples or so.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self.recent: dict[str, Tensor] = {}

    def entered(self, rows: Rows) -> dict[str, Tensor]:
        """Statistics of a sample, which is then entered. What it grew by is held against the samples before, without
        itself.
        """
        now, before = _both(rows, self.sums)
        found = (
            {"matthew_slope": matthew_slope(before, now), "rank_persistence": rank_persistence(before, now)}
            if len(now)
            else {}
        )
        for name, row in rows.items():
            self._enter(name, row)
        now, start = _both(rows, self.start)
        both = torch.stack([now, start])  # at once: they are small
        for name, statistic in INEQUALITY.items():
            found |= dict(zip((name, f"{name}_start"), statistic(both), strict=True))
        return found | {"overlap_start": top_overlap(now, start), "overlap_chance": top_overlap_chance(len(now))}

    def against(self, reference: Rows) -> dict[str, Tensor]:
        """Whether the units that matter are those of another training; nothing where they are others."""
        now, then = _both(self.recent, reference)
        return (
            {"overlap_reference": top_overlap(now, then), "rank_reference": rank_persistence(now, then)}
            if len(now)
            else {}
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors."""
        return {"sums": dict(self.sums), "start": dict(self.start), "recent": dict(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load them."""
        self.sums, self.start, self.recent = (dict(state.get(name, {})) for name in ("sums", "start", "recent"))

    def _enter(self, name: str, row: Tensor) -> None:
        """Of a step that a GradScaler is about to skip nothing is kept: it is not finite."""
        sound = row.isfinite().all()
        blank = torch.full_like(row, torch.nan)
        sums, start, recent = (_fitting(kept.get(name), row, blank) for kept in (self.sums, self.start, self.recent))
        new, row = sums.isnan().any(), torch.where(sound, row, blank)
        self.sums[name] = torch.where(sound, torch.where(new, row, sums + row), sums)
        self.start[name] = torch.where(start.isnan().any(), row, start)
        self.recent[name] = torch.where(sound, torch.where(new, row, recent + WEIGHT * (row - recent)), recent)


def importances_in(path: str | PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """Recent gates by kind of units and part, out of a checkpoint of Lightning's.

    Raises:
        ValueError: It cannot be read, or has none.
    """
    try:
        callbacks = loaded(Path(path)).get("callbacks", {})
    except ValueError as error:
        raise ValueError(f"reference={error}") from error
    try:
        probes = [
            probe
            for state in callbacks.values()
            if isinstance(state, dict)
            for probe in state.get("probes", {}).items()
        ]
        watched = [kept.get("source", {}).get("ledgers", {}) for name, kept in probes if name.endswith("concentration")]
        for ledgers in watched:
            found = {
                # A copy: the file is mapped, and a run may write over it.
                name: {part: row.clone() for part, row in ledger["recent"].items()}
                for name, ledger in ledgers.items()
                if name.endswith("_gate") and ledger.get("recent")
            }
            if found:
                return found
    except Exception as error:
        raise ValueError(f"reference={str(path)!r}: its callbacks are not as Lightning writes them") from error
    if watched:
        raise ValueError(f"reference={str(path)!r}: its ConcentrationMonitor had no gates of heads or neurons")
    raise ValueError(
        f"reference={str(path)!r}: no ConcentrationMonitor watched that run; its checkpoint contains {list(callbacks)}"
    )


def _both(rows: Rows, others: Rows) -> tuple[Tensor, Tensor]:
    """The units that both have."""
    names = [name for name, row in rows.items() if name in others and others[name].shape == row.shape]
    return _joined(rows[name] for name in names), _joined(others[name].to(rows[name]) for name in names)


def _joined(rows: Iterable[Tensor]) -> Float[Tensor, " n"]:
    known = list(rows)
    return torch.cat(known) if known else torch.empty(0)


def _fitting(kept: Tensor | None, row: Tensor, blank: Tensor) -> Tensor:
    """What was kept, where it is of the same units."""
    return blank if kept is None or kept.shape != row.shape else kept.to(row)
