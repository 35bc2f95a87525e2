"""Answers to the questions of the tab: the same over HTTP and in the file that `lightning-lowrank report` writes."""

import base64
import csv
import re
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lowrank.tensorboard.diagnosing.reading import findings_of
from lightning_lowrank.tensorboard.series import GAP, Reader, Segment, Table, thinned

Arguments = Mapping[str, str]

# What asks, in the browser: none imports what stands behind it.
MODULES = tuple(
    Path(__file__).with_name(f"{name}.js")
    for name in ("answers", "charts", "heat_map", "views", "diagnosis", "layers", "page", "index", "widths")
)

# Samples that are sent at once; more columns than a heat map has pixels would not be seen.
LIMIT = 512
MOST = 5000
# What a spreadsheet takes for the beginning of a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def runs(reader: Reader, arguments: Arguments) -> dict[str, Any]:
    """Every run with what it has, its damaged files, and its place among TensorBoard's, which gives it a colour."""
    places = {run: place for place, run in enumerate(reader.started())}
    shown = ("kind", "name", "source", "statistic", "unit", "level", "says")
    found = reader.runs()
    return {
        "runs": [
            {
                "run": run,
                "place": places.get(run, len(places)),
                "damage": reader.damage(run),
                "entries": [
                    {key: str(series[entry][-1].known.get(key, "")) for key in shown} for entry in sorted(series)
                ],
            }
            for run, series in found.items()
        ]
    }


def matrix(reader: Reader, arguments: Arguments) -> dict[str, Any]:
    """Samples x sites of a quantity, of our cost or of alerts, thinned to what can be seen; all samples of one site if
    one is named. With what a Gaussian matrix of each site's shape gives, where that is known.
    """
    parts, table = _series(reader, arguments, _kind(arguments))
    nulls = {site: value for part in parts for site, value in zip(part.sites, part.known.get("null", ()), strict=False)}
    return _answer(table, arguments) | ({"null": [nulls.get(site) for site in table.sites]} if nulls else {})


def spectra(reader: Reader, arguments: Arguments) -> dict[str, Any]:
    """Frobenius norm and order statistics of one site or of all, their ranks, and what noise has there."""
    parts, table = _series(reader, arguments, "spectrum")
    return _answer(table, arguments) | {
        "noise": [_noise(parts, site) for site in table.sites],
        "width": int(table.values.shape[-1]),
    }


def curves(reader: Reader, arguments: Arguments) -> dict[str, Any]:
    """Vectors of one site or of all, and where their numbers stand."""
    parts, table = _series(reader, arguments, "curve")
    return _answer(table, arguments) | {"axis": parts[-1].known["axis"], "width": int(table.values.shape[-1])}


def diagnosis(reader: Reader, arguments: Arguments) -> dict[str, Any]:
    """The findings of the rules for a run, worst first, and the rules without data."""
    run = _needed(arguments, "run")
    findings, idle = findings_of(reader, run, reader.runs(run).get(run, {}))
    return {
        "findings": [finding.plain() for finding in findings],
        "idle": [f"{rule} ({monitor})" for rule, monitor in idle.items()],
    }


def texts(reader: Reader, arguments: Arguments) -> dict[str, Any]:
    """Messages of the alerts."""
    return {"texts": reader.texts(_needed(arguments, "run"))}


def sheet(reader: Reader, arguments: Arguments) -> str:
    """Every sample of a quantity as CSV: a row per step, a column per site; nothing where it was not read."""
    _, table = _series(reader, arguments, _kind(arguments))
    out = StringIO()
    writer = csv.writer(out)
    writer.writerow(["step", *(f"'{site}" if site.startswith(FORMULA) else site for site in table.sites)])
    gaps = table.values.view(np.uint32) == GAP
    for step, row, missing in zip(table.steps, table.values, gaps, strict=True):
        writer.writerow([int(step), *("" if gap else str(value) for value, gap in zip(row, missing, strict=True))])
    return out.getvalue()


def script() -> str:
    """All modules as one, for a page that asks no server."""
    text = "\n".join(module.read_text(encoding="utf-8") for module in MODULES)
    return re.sub(r"^import .*\n|^export ", "", text, flags=re.MULTILINE)


ANSWERS: dict[str, Callable[[Reader, Arguments], dict[str, Any]]] = {
    "runs": runs,
    "matrix": matrix,
    "spectra": spectra,
    "curves": curves,
    "texts": texts,
    "diagnosis": diagnosis,
}


def _series(reader: Reader, arguments: Arguments, kind: str) -> tuple[list[Segment], Table]:
    """All parts of a series, and their table: of one site if one is named."""
    run, name = _needed(arguments, "run"), _needed(arguments, "name")
    parts = reader.parts(run, kind, name)
    table = reader.table(run, parts)
    return parts, table.of(arguments["site"]) if "site" in arguments else table


def _kind(arguments: Arguments) -> str:
    """Of what has a number per site."""
    kind = _needed(arguments, "kind")
    if kind in ("spectrum", "curve"):
        raise ValueError("spectra and curves are answered separately")
    return kind


def _answer(table: Table, arguments: Arguments) -> dict[str, Any]:
    limit = min(MOST, max(2, _number(arguments, "limit", LIMIT)))
    ends = (_number(arguments, "first", None), _number(arguments, "last", None))
    shown = table.at(thinned(table.steps, limit, *ends))
    return {
        "steps": shown.steps.tolist(),
        "sites": shown.sites,
        "total": len(table.steps),
        "between": len(thinned(table.steps, len(table.steps), *ends)),
        # JSON knows neither NaN nor infinity, and digits would make it three times as long.
        "values": base64.b64encode(shown.values.astype("<f4").tobytes()).decode(),
    }


def _noise(parts: list[Segment], site: str) -> dict[str, Any]:
    """Ranks, and what a Gaussian matrix of Frobenius norm 1 has there."""
    known = next(part.known for part in reversed(parts) if site in part.sites)
    return dict(known["shapes"][known["shape_of"][known["sites"].index(site)]])


def _needed(arguments: Arguments, key: str) -> str:
    if key not in arguments:
        raise ValueError(f"{key}= is missing")
    return arguments[key]


def _number(arguments: Arguments, key: str, default: Any) -> Any:
    try:
        return int(arguments[key]) if arguments.get(key) else default
    except ValueError as error:
        raise ValueError(f"{key}={arguments[key]!r} is not a whole number") from error
