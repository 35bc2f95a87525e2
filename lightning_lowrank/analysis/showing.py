"""Output of commands: tables on a terminal, JSON, safetensors."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_lowrank.analysis.plain_json import as_json

# What a pipe gets is as wide as it needs.
WIDTH = 140


def print_json(found: Mapping[str, Any]) -> None:
    """One object, on standard output; null in the place of numbers that do not exist."""
    sys.stdout.write(as_json(found, 2) + "\n")


def tell(
    title: str, rows: Sequence[tuple[str, Sequence[int], str, Mapping[str, float]]], shown: Mapping[str, str]
) -> None:
    """A table of what fits a terminal, and the names of what is not finite."""
    known = [name for name in shown if any(name in values for *_, values in rows)]
    verdicts = len({verdict for _, _, verdict, _ in rows}) > 1
    table = Table(title=escape(title), title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("matrix", overflow="fold", min_width=16)
    for heading in ("shape", *["verdict"] * verdicts, *(shown[name] for name in known)):
        widest = max(map(len, heading.split())) if heading != "shape" else 9
        table.add_column(heading, justify="left" if heading == "verdict" else "right", min_width=widest)
    for name, shape, verdict, values in rows:
        cells = [cell(values.get(key, math.nan)) for key in known]
        table.add_row(escape(name), "x".join(map(str, shape)), *[escape(verdict)] * verdicts, *cells)
    show(table)
    lost = [name for name, _, verdict, values in rows if values and not math.isfinite(next(iter(values.values())))]
    if lost:
        show(f"not finite: {escape(', '.join(lost))}")


def show(what: Any) -> None:
    """Print a table or a line."""
    Console(width=None if sys.stdout.isatty() else WIDTH, soft_wrap=isinstance(what, str)).print(what)


def cell(value: float) -> str:
    """Three digits, or a dash where there is no number."""
    return f"{value:.3g}" if math.isfinite(value) else "-"


def save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file; tensors of one memory are written under each of their names.

    Raises:
        ValueError: It cannot be written.
    """
    places: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in places else tensor
        places.add(place)
    try:
        save_file(apart, file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be written: {error}") from error
