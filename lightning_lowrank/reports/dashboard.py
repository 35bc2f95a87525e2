"""How curves are laid out: TensorBoard's custom scalars, and a table for the console. Works on the host."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
from rich.table import Table


@dataclass(frozen=True)
class Sample:
    """One report: quantity -> site -> value, at a step of Lightning's x-axis; -1 if there are several steps."""

    step: int
    values: Mapping[str, Mapping[str, float]]


Layout = dict[str, dict[str, list[Any]]]

# What stands beside a quantity, and is none of its own.
BESIDE = ("_error", "_chance", "_floor", "_random_walk", "_start")

# TensorBoard keeps one layout per run, the last written: all monitors of a run add to the same one.
_LAYOUTS: WeakKeyDictionary[Any, Layout] = WeakKeyDictionary()


def layout(charts: Mapping[str, Mapping[str, Sequence[str]]], *, margins: bool) -> Layout:
    """Custom-scalars layout: for each source one chart per quantity.

    Args:
        charts: Source -> quantity -> tags of its median, minimum and maximum over sites.
        margins: Draw the median in the band from least to most; otherwise the median alone.
    """
    kind, drawn = ("Margin", 3) if margins else ("Multiline", 1)
    return {
        f"lowrank {source}": {quantity: [kind, list(tags[:drawn])] for quantity, tags in of_source.items()}
        for source, of_source in charts.items()
        if of_source
    }


def write_layout(writer: Any, added: Layout) -> None:
    """Add to the layout of a writer that has `add_custom_scalars`; leave other writers alone."""
    if added and callable(getattr(writer, "add_custom_scalars", None)):
        whole = _LAYOUTS.setdefault(writer, {})
        whole.update(added)
        writer.add_custom_scalars(whole)


@runtime_checkable
class Watched(Protocol):
    """The memory of a monitor about its run."""

    @property
    def label(self) -> str: ...

    @property
    def first(self) -> Sample | None: ...

    @property
    def latest(self) -> Sample | None: ...

    @property
    def overhead(self) -> float: ...

    @property
    def no_number_since(self) -> int | None: ...


def summary_table(monitor: Watched) -> Table:
    """Medians over sites of each quantity at the first and the latest sample, and the site that is lowest now, with its
    standard error.

    Args:
        monitor: A monitor that has watched a run; without a sample the table is empty.
    """
    first, latest = monitor.first or Sample(0, {}), monitor.latest or Sample(0, {})
    table = Table(title=title_of(monitor), caption="medians over sites, and the lowest now")
    # A name as long as `layers_feature_participation_ratio` stays on one line of 80 columns, and sites are folded.
    table.add_column("quantity", overflow="fold", no_wrap=max(map(len, latest.values), default=0) <= 36)
    for heading in (_heading(first, "first"), _heading(latest, "latest"), "lowest"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    table.add_column("at", overflow="fold")
    before = ""
    errors = {quantity: latest.values.get(f"{quantity}_error", {}) for quantity in latest.values}
    for quantity, values in latest.values.items():
        if quantity.removesuffix("_error") in errors.keys() - {quantity}:
            continue
        finite = {site: value for site, value in values.items() if np.isfinite(value)}
        lowest = min(finite, key=finite.__getitem__, default="")
        source = quantity.partition("_")[0]
        if source != before:
            table.add_section()
        before = source
        now = _with_error(finite[lowest], errors[quantity].get(lowest, 0.0)) if finite else "-"
        table.add_row(quantity, _median(first.values.get(quantity, {})), _median(values), now, lowest)
    return table


def title_of(monitor: Watched) -> str:
    """The cost of watching, and the step from which nothing can be read."""
    silent = "" if monitor.no_number_since is None else f"; no number since step {monitor.no_number_since}"
    cost = "" if np.isnan(monitor.overhead) else f": training takes {monitor.overhead:.2f} % longer"
    return f"{monitor.label}{cost}{silent}"


def lines_of(monitor: Watched, most: int, width: int) -> list[str]:
    """The same in few lines: the first quantities of each source, as many as fit.

    Args:
        monitor: As for the table.
        most: Lines, the title and the heading among them; 2 at least.
        width: Of each line but the title, whose name stays whole.
    """
    first, latest = monitor.first or Sample(0, {}), monitor.latest or Sample(0, {})
    shown = leading(latest.values, most - 2)
    names = [len(name) for name in shown]
    room = max(names, default=0)
    ends = f"{_heading(first, 'first'):>10} {_heading(latest, 'latest'):>10}"
    heading = f"{'median over sites':{room}} {ends} {'lowest':>9}  at"
    lines = [heading] if shown else []
    for quantity in shown:
        values = {site: value for site, value in latest.values[quantity].items() if np.isfinite(value)}
        at = min(values, key=values.__getitem__, default="")
        ends = f"{_median(first.values.get(quantity, {})):>10} {_median(values):>10}"
        lines.append(f"{quantity:{room}} {ends} {f'{values[at]:.3g}' if values else '-':>9}  {at}")
    return [
        title_of(monitor),
        *(line if len(line) <= width else f"{line[: width - 1]}\N{HORIZONTAL ELLIPSIS}" for line in lines),
    ]


def leading(quantities: Iterable[str], most: int) -> list[str]:
    """Some of them in their order: of each source the first one, then of each the second, and so on. Errors and what
    chance gives are none of their own.
    """
    rows = [name for name in quantities if not name.endswith(BESIDE) or name.endswith("_over_floor")]
    groups: dict[str, list[str]] = {}
    for name in rows:
        groups.setdefault(name.partition("_")[0], []).append(name)
    turns = [name for turn in zip_longest(*groups.values()) for name in turn if name is not None]
    chosen = set(turns[: max(0, most)])
    return [name for name in rows if name in chosen]


def _heading(sample: Sample, word: str) -> str:
    return f"step {sample.step}" if sample.step >= 0 else word


def _with_error(value: float, error: float) -> str:
    return f"{value:.3g} \N{PLUS-MINUS SIGN} {error:.2g}" if error > 0 else f"{value:.3g}"


def _median(values: Mapping[str, float]) -> str:
    finite = [value for value in values.values() if np.isfinite(value)]
    return f"{np.median(finite):.3g}" if finite else "-"
