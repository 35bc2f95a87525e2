"""Our numbers in event files: `report` as a page, `summary` as a table."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rich
from rich.markup import escape

from lightning_lowrank.analysis.overwriting import writable
from lightning_lowrank.analysis.page import page_of, reader_of
from lightning_lowrank.analysis.plain_json import as_json
from lightning_lowrank.reports.dashboard import Sample, leading, lines_of, summary_table
from lightning_lowrank.tensorboard import answers
from lightning_lowrank.tensorboard.diagnosing.judging import silent_since
from lightning_lowrank.tensorboard.series import Reader, Table

# What a terminal shows at once.
LINES, WIDTH = 25, 80


@dataclass(frozen=True)
class Run:
    """The data of a run that a table shows.

    Attributes:
        label: Its name.
        overhead: Increase of training time in percent, by all monitors together.
        alerts: Rule -> 0, 1 or 2, at the latest sample.
        no_number_since: Step from which on all numbers are NaN; None if some are not.
    """

    label: str
    overhead: float
    first: Sample | None
    latest: Sample | None
    alerts: Mapping[str, float]
    no_number_since: int | None = None


def report(run_dir: str, output: str = "report.html", samples: int = answers.LIMIT) -> None:
    """Write the tab as one HTML file.

    Args:
        run_dir: A folder with event files, of one run or of several.
        output: File to write.
        samples: Largest number of samples of each quantity, evenly spread.

    Raises:
        ValueError: There are no event files, `samples` is below 1, or the file cannot be written.
    """
    if samples < 1:
        raise ValueError(f"--samples={samples} must be at least 1")
    file = writable(output)
    reader = reader_of(Path(run_dir))
    write(file, page_of(reader, Path(run_dir).resolve().name, samples))
    count, size = len(reader.runs()), file.stat().st_size / 2**20
    sys.stdout.write(f"{output}: {count} run{'' if count == 1 else 's'}, {size:.1f} MiB\n")


def summary(run_dir: str, *, all: bool = False, json: bool = False) -> None:
    """Print medians and the lowest sites, in at most 25 lines: the first quantities of each source.

    Args:
        run_dir: A folder with event files, of one run or of several.
        all: Print a table of every quantity of every run.
        json: Print the numbers of all sites, null for missing ones.

    Raises:
        ValueError: There are no event files.
    """
    reader = reader_of(Path(run_dir))
    runs = [_run(reader, name, series) for name, series in reader.runs().items()]
    if json:
        _print_json(runs)
        return
    runs = [replace(run, label=Path(run_dir).resolve().name) if run.label == "." else run for run in runs]
    if all:
        _print_tables(runs)
    else:
        sys.stdout.write("".join(f"{line}\n" for line in brief(runs)))


def brief(runs: Sequence[Run], most: int = LINES, width: int = WIDTH) -> list[str]:
    """All runs in few lines, shared evenly; if there are many runs, each has its title only."""
    shown = runs[: most - 1]
    each = (most - 1) // max(1, len(shown))
    lines = [line for run in shown for line in [*lines_of(run, each - bool(_firing(run)), width), *_firing(run)][:each]]
    hidden = sum(len(run.latest.values) if run.latest else 0 for run in runs) - sum(
        len(leading(run.latest.values, each - 2)) if run.latest else 0 for run in shown
    )
    more = f"{hidden} more quantities" + (f" and {len(runs) - len(shown)} more runs" if len(runs) > len(shown) else "")
    return [*lines, f"{more}: --all"] if hidden or len(runs) > len(shown) else lines


def _firing(run: Run) -> list[str]:
    rules = [rule for rule, state in run.alerts.items() if state >= 2]
    return [f"firing: {', '.join(rules)}"] if rules else []


def write(file: Path, text: str) -> None:
    """Write a file.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error.strerror}") from error


def _run(reader: Reader, name: str, series: Mapping[tuple[str, str], Any]) -> Run:
    tables = {key: reader.table(name, parts) for key, parts in series.items() if key[0] not in ("spectrum", "curve")}
    tables = {key: table for key, table in tables.items() if len(table.steps)}
    first, latest = (
        _sample({quantity: table for (kind, quantity), table in tables.items() if kind == "vector"}, end)
        for end in (0, -1)
    )
    alerts = _sample({key[1]: table for key, table in tables.items() if key[0] == "alert"}, -1)
    return Run(
        name,
        _overhead([table for (kind, _), table in tables.items() if kind == "cost"], reader.last_step(name)),
        first,
        latest,
        {rule: state for states in alerts.values.values() for rule, state in states.items()},
        silent_since({name: table for (kind, name), table in tables.items() if kind == "vector"}),
    )


def _overhead(costs: Sequence[Table], last_step: int) -> float:
    """Percent by which all monitors of a run have made it longer.

    What a monitor says at its last sample is of the time until then: of one that has long stopped it is no share of the
    run. Where all have stopped before the last number that was logged, steps since then count as those before. Files of
    earlier versions have no times; their steps stand for them.
    """
    own, longest, more = 0.0, 0.0, 1.0
    for table in costs:
        last, steps = dict(zip(table.sites, table.values[-1].tolist(), strict=True)), float(table.steps[-1] + 1)
        so_far, percent = last.get("training_time_ms", steps), last.get("overhead_percent", math.nan)
        own += so_far * percent / (100 + percent)
        if so_far > longest:
            longest, more = so_far, max(1.0, (last_step + 1) / steps)
    return 100 * own / ((longest - own) * more) if longest > own else math.nan


def _sample(tables: Mapping[str, Any], end: int) -> Sample:
    """What each quantity was at one end of its curve; monitors need not have been at the same step."""
    steps = {int(table.steps[end]) for table in tables.values()} or {0}
    rows = {
        name: dict(zip(table.sites, table.values[end].tolist(), strict=True)) for name, table in sorted(tables.items())
    }
    return Sample(steps.pop() if len(steps) == 1 else -1, rows)


def _print_json(runs: Sequence[Run]) -> None:
    sys.stdout.write(as_json({run.label: _plain(run) for run in runs}, 2) + "\n")


def _print_tables(runs: Sequence[Run]) -> None:
    for run in runs:
        rich.print(summary_table(_escaped(run)))
        for line in _firing(run):
            rich.print(escape(line))


def _escaped(run: Run) -> Run:
    """Names may have brackets, which rich takes for markup."""

    def plain(sample: Sample | None) -> Sample | None:
        return sample and Sample(
            sample.step,
            {escape(q): {escape(site): value for site, value in row.items()} for q, row in sample.values.items()},
        )

    return replace(run, label=escape(run.label), first=plain(run.first), latest=plain(run.latest))


def _plain(run: Run) -> dict[str, Any]:
    ends = {"first": run.first or Sample(0, {}), "latest": run.latest or Sample(0, {})}
    said = {
        end: {"step": sample.step if sample.step >= 0 else None, "values": sample.values}
        for end, sample in ends.items()
    }
    return {"overhead_percent": run.overhead, "alerts": run.alerts, **said}
