"""How presets put a monitor together."""

from collections.abc import Sequence
from typing import Literal

from lightning_lowrank.measuring.number_source import NumberSource
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.schedules import Budget, Every
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor


def monitor_of(
    source: NumberSource,
    schedule: Every | Budget,
    *,
    label: str,
    alerts: Sequence[Alert] | Literal["default"] | None,
    per_site: bool | Literal["auto"],
    seed: int,
    name: str | None,
) -> Monitor:
    """A monitor of everything that a number source gives."""
    probe = Probe(source.name, source, [quantity.name for quantity in source.quantities], schedule)
    return Monitor([probe], per_site=per_site, seed=seed, alerts=alerts, name=name, label=label)


def cadence(every_n_steps: int | None, max_overhead: float | None, default: int) -> Every | Budget:
    """The schedule that a user asked for.

    Raises:
        ValueError: Both are given.
    """
    if max_overhead is None:
        return Every(default if every_n_steps is None else every_n_steps)
    if every_n_steps is not None:
        raise ValueError(
            f"every_n_steps={every_n_steps} and max_overhead={max_overhead}: one of them, for the "
            "budget chooses the cadence"
        )
    return Budget(max_overhead)
