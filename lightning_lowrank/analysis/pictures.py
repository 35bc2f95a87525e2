"""The first view and the maps of a run as images, for loggers that show images: drawn with matplotlib."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from lightning_lowrank.tensorboard.diagnosing.judging import Finding
from lightning_lowrank.tensorboard.diagnosing.reading import findings_of
from lightning_lowrank.tensorboard.series import Reader, Segment, Table, thinned

Series = Mapping[tuple[str, str], Sequence[Segment]]

# Of each source the first of these is drawn, as the tab's map opens on it.
MAPPED = ("effective_rank", "stable_rank", "participation_ratio")
# As in the tab: violet is less than the first value, orange is more, light is no change.
DIVERGING = ("#452788", "#998ec3", "#f2f2f2", "#f1a340", "#9c4c02")
HATCHED: dict[str, Any] = {"facecolor": "#969696", "edgecolor": "#4a4a4a", "hatch": "////", "linewidth": 0, "zorder": 0}
SEVERITIES = {"critical": ("#b3122d", "#ffffff"), "warning": ("#ffd98a", "#3b2a00"), "info": ("#d6e4f5", "#10304f")}
INK, SOFT = "#212121", "#616161"
# A multiple that is nearer to 1 than this is drawn as if nothing had changed much.
LEAST_CHANGE = np.log2(1.1)
# Samples, names of layers and steps that can be told apart.
COLUMNS, NAMES, MARKS = 512, 60, 10
# Names are shown as they are written: a dollar begins no formula.
PLAIN: dict[str, Any] = {"parse_math": False}


def pictures(reader: Reader, folder: Path, run: str = ".") -> dict[str, Path]:
    """Write `diagnosis.png`, and for each source that has ranks a map of its layers over steps.

    Args:
        reader: Of the event files.
        folder: Where they are written.
        run: Its name.

    Returns:
        Name -> file.
    """
    series = reader.runs(run).get(run, {})
    figures = {"diagnosis": _first_view(reader, run, series)}
    for name in mapped(series):
        figures[f"map_{name}"] = _map(name, reader.table(run, series["vector", name]))
    files = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(files[name], dpi=100)
    return files


def mapped(series: Series) -> list[str]:
    """Of each source the quantity whose map is drawn."""
    found: dict[str, str] = {}
    for end in MAPPED:
        for (kind, name), parts in series.items():
            known = parts[-1].known
            if kind == "vector" and known.get("source") and str(known.get("statistic", "")).endswith(end):
                found.setdefault(str(known["source"]), name)
    return sorted(found.values())


def _first_view(reader: Reader, run: str, series: Series) -> Any:
    """What the rules say, worst first, with the curve beside each line."""
    findings, _ = findings_of(reader, run, series)
    rows = max(len(findings), 1)
    figure = _figure(11.0, 0.3 + 1.3 * rows)
    if not findings:
        figure.text(0.02, 0.5, "Nothing to report: no rule holds in the last samples.", color=INK, fontsize=11)
    for i, finding in enumerate(findings):
        top = 1 - (0.15 + 1.3 * i) / (0.3 + 1.3 * rows)
        high = 1.3 / (0.3 + 1.3 * rows)
        _say(figure, finding, top)
        curve = _curve_of(reader, run, series, finding)
        if curve is not None:
            _small_curve(figure.add_axes((0.74, top - 0.8 * high, 0.24, 0.7 * high)), *curve, finding.since)
    return figure


def _say(figure: Any, finding: Finding, top: float) -> None:
    """A finding in words."""
    paper, ink = SEVERITIES[finding.severity]
    badge = {"facecolor": paper, "edgecolor": "none", "boxstyle": "round,pad=0.3"}
    style: dict[str, Any] = {"va": "top", **PLAIN}
    figure.text(0.02, top, finding.severity, color=ink, fontsize=9, bbox=badge, **style)
    more = f" and {finding.num_sites - 1} more" if finding.num_sites > 1 else ""
    head = f"{finding.rule.replace('-', ' ')} · {finding.site}{more}: {finding.says}"
    told = {"healthy: ": finding.band, "usual cause: ": finding.cause}
    rest = "; ".join([f"Since step {finding.since}", *(f"{word}{what}" for word, what in told.items() if what)])
    text = f"{fill(head, 88)}\n{fill(rest, 88)}\n{fill(f'Try: {finding.advice}.', 88)}"
    figure.text(0.11, top, text, color=INK, fontsize=9, linespacing=1.35, **style)


def _curve_of(reader: Reader, run: str, series: Series, finding: Finding) -> tuple[str, Any, Any] | None:
    """Name, steps and numbers of the finding's site, or of the median where it is of all."""
    parts = series.get(("vector", finding.quantity))
    table = None if parts is None else reader.table(run, parts)
    if table is None or len(table.steps) < 2:
        return None
    if finding.site in table.sites:
        return finding.quantity, table.steps, table.of(finding.site).values[:, 0]
    return finding.quantity, table.steps, [_median(row) for row in table.values]


def _small_curve(axes: Any, name: str, steps: Any, values: Any, since: int) -> None:
    axes.plot(steps, values, color="#1f77b4", linewidth=1.5)
    axes.axvline(since, color="#b83d00", linewidth=1, linestyle=":")
    axes.set_title(name.replace("_", " "), fontsize=8, color=SOFT, loc="left", pad=3, **PLAIN)
    axes.tick_params(labelsize=7, colors=SOFT)
    axes.spines[["top", "right"]].set_visible(False)


def _map(name: str, table: Table) -> Any:
    """Layers over samples, as multiples of each layer's first value on a logarithmic scale with 1 in its middle."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    table = table.at(thinned(table.steps, COLUMNS))
    values = table.values.T.astype(np.float64)
    with np.errstate(all="ignore"):
        change = np.log2(values / [[_first(row)] for row in values])
    known = change[np.isfinite(change)]
    most = max(float(np.abs(known).max(initial=0)), LEAST_CHANGE)
    high = min(0.22 * len(table.sites), 9) + 1.1
    figure = _figure(10.0, high)
    axes = figure.add_axes((0.26, 0.5 / high, 0.62, (high - 1) / high))
    # What is no number lets the hatched paper through.
    colours = LinearSegmentedColormap.from_list("diverging", DIVERGING).with_extremes(bad="none")
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **HATCHED))
    image = axes.imshow(change, aspect="auto", interpolation="nearest", cmap=colours, vmin=-most, vmax=most)
    lost = "; hatched: no number" if len(known) < change.size else ""
    title = f"{name.replace('_', ' ')}, multiples of the first{lost}"
    axes.set_title(title, fontsize=10, color=INK, loc="left", **PLAIN)
    _name_rows(axes, table)
    bar = figure.colorbar(image, cax=figure.add_axes((0.9, 0.5 / high, 0.015, (high - 1) / high)))
    bar.set_ticks([-most, 0, most], labels=[f"{2**-most:.3g}", "1", f"{2**most:.3g}"], fontsize=8)
    return figure


def _name_rows(axes: Any, table: Table) -> None:
    """Layers at the left, steps below."""
    rows = np.arange(0, len(table.sites), max(1, -(-len(table.sites) // NAMES)))
    axes.set_yticks(rows, [table.sites[row] for row in rows], fontsize=8 if len(table.sites) <= 40 else 6, **PLAIN)
    columns = np.arange(0, len(table.steps), max(1, -(-len(table.steps) // MARKS)))
    axes.set_xticks(columns, [str(table.steps[column]) for column in columns], fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(length=2, colors=INK)
    axes.spines[:].set_visible(False)


def _figure(width: float, height: float) -> Any:
    """One that belongs to no window and no list of figures: it goes when it is written."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def _first(row: Any) -> float:
    return next(_finite(row), float("nan"))


def _median(row: Any) -> float:
    known = list(_finite(row))
    return float(np.median(known)) if known else float("nan")


def _finite(row: Any) -> Iterator[float]:
    return (float(value) for value in row if np.isfinite(value))
