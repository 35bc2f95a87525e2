"""What checkpoints have: `spectra` of one or several, `diff` of two."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from torch.utils.tensorboard import SummaryWriter

from lightning_lowrank.analysis.architectures import module_of
from lightning_lowrank.analysis.diff import TOP, differences
from lightning_lowrank.analysis.matrices import Place, places
from lightning_lowrank.analysis.page import page_of, reader_of
from lightning_lowrank.analysis.runs import write
from lightning_lowrank.analysis.showing import finite, print_json, save, show, tell
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
    """Print ranks, tails and outliers of every matrix of checkpoints.

    Args:
        checkpoints: Files or folders.
        statistics: Names as in the concepts page; ranks, tails and outliers unless given.
        match: Only matrices whose name fits one of these globs or `re:REGEX`.
        exclude: Not these.
        model: `module:function` that makes the module, whose classes say how fused weights divide.
        output: A safetensors file for the singular values.
        page: An HTML file for all numbers and spectra.
        heads: Split attention weights by head.
        exact: Decompose matrices above 1500 a side exactly, which takes long, instead of sketching them.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read or written, or an argument fits nothing.
    """
    found: dict[str, list[Row]] = {}
    for path in checkpoints:
        file = Checkpoint(path)
        there = _places(file, model, match=match, exclude=exclude, heads=heads)
        limit = sys.maxsize if exact else SKETCH_ABOVE
        found[path] = list(_watched(spectra_of(file, there, statistics or STATISTICS, sketch_above=limit), there, path))
    for target, made in ((output, _save), (page, _written)):
        if target is not None:
            made(found, Path(target))
            Console(stderr=True).print(f"wrote {escape(target)}")
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
    heads: bool = False,
    json: bool = False,
) -> None:
    """Print what training changed from checkpoint A to checkpoint B, matrix by matrix.

    Args:
        a: A file or folder.
        b: Another one.
        top: Singular directions of A and B that are compared.
        energy: Share of the energy of the change that the suggested LoRA rank keeps.
        match: Only matrices whose name fits one of these globs or `re:REGEX`.
        exclude: Not these.
        model: `module:function` that makes the module, whose classes say how fused weights divide.
        heads: Split attention weights by head.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read, an argument fits nothing, or no matrix is in both files.
    """
    files = Checkpoint(a), Checkpoint(b)
    in_a, in_b = (_places(file, model, match=match, exclude=exclude, heads=heads) for file in files)
    found = list(_watched(differences(*files, in_a, in_b, top=top, energy=energy), in_a, f"{a} and {b}"))
    if json:
        print_json({d.name: {"shape": d.shape, "verdict": d.verdict, **finite(d.values)} for d in found})
    else:
        tell(f"{a} -> {b}", [(d.name, d.shape, d.verdict, d.values) for d in found], CHANGES)
        counts = {
            verdict: sum(d.verdict == verdict for d in found) for verdict in dict.fromkeys(d.verdict for d in found)
        }
        show("; ".join(f"{count} {escape(verdict)}" for verdict, count in counts.items()))


def _places(file: Checkpoint, model: str | None, **chosen: Any) -> list[Place]:
    return places(file, module_of(file, model), **chosen)


def _watched(rows: Iterable[Any], there: Sequence[Place], path: str) -> Iterator[Any]:
    """Rows with a bar, on the terminal alone: what a pipe gets is numbers."""
    total = sum(len(place.site.labels) for place in there)
    return iter(track(rows, escape(path), total=total, console=Console(stderr=True), transient=True))


def _numbers(row: Row) -> dict[str, Any]:
    errors = {f"{name}_error": error for name, error in row.errors.items() if error}
    return {"shape": row.shape, **finite(row.values | errors)}


def _save(found: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Singular values, where there are all; of one checkpoint by the name of the matrix, of several by the file too."""
    values = {
        f"{path}:{row.name}" if len(found) > 1 else row.name: row.singular.contiguous()
        for path, rows in found.items()
        for row in rows
        if row.singular is not None
    }
    save(values, file)


def _written(found: Mapping[str, Sequence[Row]], file: Path) -> None:
    write(file, _page(found, file.stem))


def _page(found: Mapping[str, Sequence[Row]], title: str) -> str:
    """The report's page, with a run for each checkpoint."""
    with TemporaryDirectory() as folder:
        for number, (path, rows) in enumerate(found.items()):
            writer = SummaryWriter(str(Path(folder) / f"{number}_{Path(path).name}"))
            vectors.Vectors().draw(_drawn(rows), 0)(writer)
            writer.close()
        return page_of(reader_of(Path(folder)), title, 1)


def _drawn(rows: Sequence[Row]) -> list[vectors.Row]:
    """What the tab has of a source of matrices."""
    known = {"source": "weight", "level": "weights"}
    drawn = [
        vectors.Row(
            "vector",
            f"weight_{name}",
            {row.name: row.values[name] for row in rows},
            {**known, "statistic": name, "unit": find(name).unit},
        )
        for name in (rows[0].values if rows else ())
    ]
    there = {row.name: row.orders for row in rows}
    return [*drawn, vectors.Row("spectrum", "weight", there, known, [row.shape for row in rows])]
