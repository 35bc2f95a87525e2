"""Commands for checkpoints: `spectra` of one or several, `diff` of two."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from lightning_lowrank.analysis.architectures import module_of
from lightning_lowrank.analysis.diff import TOP, Difference, differences
from lightning_lowrank.analysis.drawing import draw, numbers
from lightning_lowrank.analysis.matrices import Place, places
from lightning_lowrank.analysis.overwriting import tensors_file
from lightning_lowrank.analysis.showing import print_json, save, show, tell
from lightning_lowrank.analysis.spectra import STATISTICS, Row
from lightning_lowrank.analysis.spectra import spectra as spectra_of
from lightning_lowrank.maths.spectra.decompose import SKETCH_ABOVE
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.reports import vectors
from lightning_lowrank.statistics import find

# What a table has room for; JSON and the page have all.
SHOWN = {
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "relative_effective_rank": "eff. rank / Gauss",
    "tail_exponent": "tail exponent",
    "marchenko_pastur_outliers": "outliers",
}
# Matrices of one verdict that a line names.
FEW = 5
CHANGES = {
    "change_over_weight": "change / weight",
    "change_stable_rank": "stable rank",
    "change_relative_stable_rank": "stable rank / Gauss",
    "change_in_top_left_over_chance": "in top of A / chance",
    "intruders": "intruders",
    "lora_rank": "LoRA rank",
}


def spectra(
    checkpoints: list[str],
    *,
    statistics: list[str] | None = None,
    match: list[str] | None = None,
    exclude: list[str] | None = None,
    model: str | None = None,
    output: str | None = None,
    page: str | None = None,
    heads: bool = False,
    exact: bool = False,
    json: bool = False,
) -> None:
    """Print ranks, tails and outliers of the matrices in checkpoints.

    Args:
        checkpoints: Files or folders.
        statistics: Names of statistics, as on the concepts page. Default: ranks, tails and outliers.
        match: Only matrices whose name matches one of these globs or `re:REGEX`.
        exclude: Leave these out.
        model: `module:function` that makes the module, whose classes tell how fused weights are split.
        output: Safetensors file for the singular values.
        page: HTML file for all numbers and spectra.
        heads: Split attention weights by head.
        exact: Decompose matrices larger than 1500 x 1500 exactly instead of sketching them. This is slow.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read or written, or a pattern matches nothing.
    """
    file = None if output is None else tensors_file(output)
    found: dict[str, list[Row]] = {}
    for path in checkpoints:
        checkpoint = Checkpoint(path)
        there = _places(checkpoint, model, match=match, exclude=exclude, heads=heads)
        limit = sys.maxsize if exact else SKETCH_ABOVE
        measured = spectra_of(checkpoint, there, statistics or STATISTICS, sketch_above=limit)
        found[path] = list(_watched(measured, there, path))
    if file is not None:
        _save(found, file)
        Console(stderr=True).print(f"wrote {escape(str(file))}")
    if page is not None:
        draw(page, {path: {0: _drawn(rows)} for path, rows in found.items()})
    if json:
        print_json({path: {row.name: _numbers(row) for row in rows} for path, rows in found.items()})
    else:
        for path, rows in found.items():
            tell(path, [(row.name, row.shape, "", row.values) for row in rows], SHOWN)


def diff(
    a: str,
    b: str,
    *,
    top: int = TOP,
    energy: float = 0.9,
    match: list[str] | None = None,
    exclude: list[str] | None = None,
    model: str | None = None,
    page: str | None = None,
    heads: bool = False,
    json: bool = False,
) -> None:
    """Print what training changed from checkpoint A to checkpoint B, matrix by matrix.

    Args:
        a: Checkpoint A: a file or folder.
        b: Checkpoint B.
        top: Number of top singular directions of A and B to compare.
        energy: Share of the energy of the change that the suggested LoRA rank keeps.
        match: Only matrices whose name matches one of these globs or `re:REGEX`.
        exclude: Leave these out.
        model: `module:function` that makes the module, whose classes tell how fused weights are split.
        page: HTML file for all numbers and the spectra of changes.
        heads: Split attention weights by head.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read or written, a pattern matches nothing, or no matrix is in both files.
    """
    files = Checkpoint(a), Checkpoint(b)
    in_a, in_b = (_places(file, model, match=match, exclude=exclude, heads=heads) for file in files)
    found = list(_watched(differences(*files, in_a, in_b, top=top, energy=energy), in_a, f"{a} and {b}"))
    if page is not None:
        draw(page, {f"{Path(a).stem} to {Path(b).name}": {0: _changed(found)}})
    if json:
        print_json({d.name: _told(d) for d in found})
    else:
        tell(f"{a} -> {b}", [(d.name, d.shape, d.verdict, d.values) for d in found], CHANGES)
        show("; ".join(_counted(found)))
        for dtypes in dict.fromkeys(d.dtypes for d in found if d.dtypes):
            count = sum(d.dtypes == dtypes for d in found)
            show(f"{count} matrices are {dtypes[0]} in A and {dtypes[1]} in B, so rounding alone changes entries")


def _counted(found: Sequence[Difference]) -> Iterator[str]:
    """How many matrices have each verdict; which, if they are few among others."""
    verdicts: dict[str, list[str]] = {}
    for one in found:
        verdicts.setdefault(one.verdict, []).append(one.name)
    for verdict, names in verdicts.items():
        few = len(verdicts) > 1 and len(names) <= FEW
        yield escape(f"{len(names)} {verdict}" + (f" ({', '.join(names)})" if few else ""))


def _told(one: Difference) -> dict[str, Any]:
    dtypes = {"dtypes": one.dtypes} if one.dtypes else {}
    return {"shape": one.shape, "verdict": one.verdict, **dtypes, **one.values}


def _places(file: Checkpoint, model: str | None, **chosen: Any) -> list[Place]:
    return places(file, module_of(file, model), **chosen)


def _watched(rows: Iterable[Any], there: Sequence[Place], path: str) -> Iterator[Any]:
    """Rows with a bar, on the terminal alone: what a pipe gets is numbers."""
    total = sum(len(place.site.labels) for place in there)
    return iter(track(rows, escape(path), total=total, console=Console(stderr=True), transient=True))


def _numbers(row: Row) -> dict[str, Any]:
    errors = {f"{name}_error": error for name, error in row.errors.items() if error}
    return {"shape": row.shape, **row.values, **errors}


def _save(found: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Singular values, where there are all; of one checkpoint by the name of the matrix, of several by the file too."""
    values = {
        f"{path}:{row.name}" if len(found) > 1 else row.name: row.singular.contiguous()
        for path, rows in found.items()
        for row in rows
        if row.singular is not None
    }
    save(values, file)


def _drawn(rows: Sequence[Row]) -> list[vectors.Row]:
    """What the page has of a checkpoint."""
    units = {name: find(name).unit for name in (rows[0].values if rows else ())}
    return [*numbers("weight", {row.name: row.values for row in rows}, units), _spectrum("weight", rows)]


def _changed(found: Sequence[Difference]) -> list[vectors.Row]:
    """What the page has of what training changed."""
    values = {one.name: one.values for one in found if one.values}
    return [*numbers("change", values), _spectrum("change", [one for one in found if one.orders is not None])]


def _spectrum(source: str, rows: Sequence[Row] | Sequence[Difference]) -> vectors.Row:
    """As the tab draws spectra."""
    there: dict[str, Any] = {row.name: row.orders for row in rows}
    return vectors.Row("spectrum", source, there, {"source": source, "level": "weights"}, [row.shape for row in rows])
