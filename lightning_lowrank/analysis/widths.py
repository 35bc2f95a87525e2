"""`lightning-lowrank coordinate-check`."""

from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_lowrank.analysis.architectures import imported
from lightning_lowrank.analysis.coordinates import QUANTITIES, Layers, Power, powers, run, task_of
from lightning_lowrank.analysis.overwriting import writable
from lightning_lowrank.analysis.page import called
from lightning_lowrank.analysis.runs import write
from lightning_lowrank.analysis.showing import cell, print_json, show

HEADINGS = dict(
    zip(QUANTITIES, ("own", "inherited", "share", "size", "norm of W", "norm of dW", "gradient"), strict=True)
)


def coordinate_check(
    function: str,
    *,
    widths: str = "64,128,256,512",
    steps: int = 5,
    seeds: int = 3,
    output: str | None = None,
    json: bool = False,
) -> None:
    """Print how the changes of each linear layer in a short run depend on the width of the network.

    Args:
        function: `module:function` that takes a width and returns (module, optimizer, batches, loss(module, batch) ->
            scalar).
        widths: At least three widths, separated by commas.
        steps: Steps of each run.
        seeds: Number of runs for each width.
        output: HTML file for a chart of each quantity over the widths.
        json: Print all numbers.

    Raises:
        ValueError: The function is missing or returns something else, an argument is out of range, or the file cannot
            be written.
    """
    file = None if output is None else writable(output)
    found = runs(function, widths_of(widths), steps=steps, seeds=seeds)
    known = powers(found)
    plain = {name: _plain(rows, name, found) for name, rows in known.items()}
    title = f"{function}: powers of the width, {steps} steps, {seeds} seeds"
    if file is not None:
        write(file, called("overWidths", {"title": title, "quantities": QUANTITIES, "layers": plain}, title))
        Console(stderr=True).print(f"wrote {escape(str(file))}")
    if json:
        print_json(plain)
        return
    show(table_of(known, title))
    verdicts = [rows["own"].verdict for rows in known.values()]
    show("; ".join(f"{verdicts.count(one)} of {len(verdicts)} layers: {one}" for one in dict.fromkeys(verdicts)))


def widths_of(text: str) -> list[int]:
    """The widths as ascending whole numbers.

    Raises:
        ValueError: There are fewer than three widths, or one is invalid.
    """
    words = [word.strip() for word in text.split(",")]
    found = sorted({int(word) for word in words if word.isdecimal()})
    if not all(word.isdecimal() for word in words) or len(found) < 3 or found[0] < 1:
        raise ValueError(f"--widths {text}: expected at least three different whole numbers, such as 64,128,256")
    return found


def runs(function: str, widths: Sequence[int], *, steps: int, seeds: int) -> dict[int, list[Layers]]:
    """The measures of each linear layer, for each width and seed.

    Raises:
        ValueError: As `coordinate_check`.
    """
    if steps < 1 or seeds < 1:
        raise ValueError(f"--steps {steps} and --seeds {seeds} must be at least 1")
    make = imported(function)
    found: dict[int, list[Layers]] = {}
    with torch.random.fork_rng():
        for width in widths:
            for seed in range(seeds):
                torch.manual_seed(seed)
                found.setdefault(width, []).append(run(task_of(function, make, width), steps, seed))
    return found


def table_of(known: Mapping[str, Mapping[str, Power]], title: str) -> Table:
    """A row for each layer; each power has its standard error."""
    table = Table(title=escape(title), title_justify="left", box=None)
    for heading in ("layer", "verdict", *HEADINGS.values()):
        table.add_column(heading, justify="left" if heading in ("layer", "verdict") else "right", overflow="fold")
    for name, rows in known.items():
        cells = [f"{cell(rows[key].exponent)} ({cell(rows[key].error)})" for key in HEADINGS]
        table.add_row(escape(name), rows["own"].verdict, *cells)
    return table


def _plain(rows: Mapping[str, Power], name: str, found: Mapping[int, Sequence[Layers]]) -> dict[str, object]:
    """Powers with their errors, and means over seeds at each width."""
    return {"verdict": rows["own"].verdict} | {
        quantity: {
            "power": one.exponent,
            "error": one.error,
            "means": {
                str(width): sum(layers[name][quantity] for layers in several) / len(several)
                for width, several in found.items()
            },
        }
        for quantity, one in rows.items()
    }
