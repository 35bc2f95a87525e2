"""The command line: what event files have of us, as a page or as a table; what watching a model will cost.

lightning-lowrank report RUN_DIR -o report.html
lightning-lowrank summary RUN_DIR --json
lightning-lowrank plan my_package.models:gpt2 --devices 8 --dtype bf16 --tokens-per-step 8192
"""

import html
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from rich.markup import escape
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext

from lightning_lowrank.analysis.planning import command
from lightning_lowrank.reports.dashboard import Sample, summary_table
from lightning_lowrank.tensorboard import answers
from lightning_lowrank.tensorboard.series import Reader

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Low rank: {title}</title>
</head>
<body>
<script type="application/json" id="answers">{answers}</script>
<script type="module">
{module}
report(JSON.parse(document.getElementById("answers").textContent));
</script>
</body>
</html>
"""

# Spectra are long: as many as can be told apart in one chart.
SPECTRA = 40


@dataclass(frozen=True)
class Run:
    """What a table needs of a run.

    Attributes:
        label: Its name.
        overhead: Percent by which training took longer.
        alerts: Rule -> 0, 1 or 2, at the latest sample.
    """

    label: str
    overhead: float
    first: Sample | None
    latest: Sample | None
    alerts: Mapping[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """What `lightning-lowrank` does."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    options = asked[asked.subcommand]
    if asked.subcommand == "plan":
        command.run(options)
        return
    try:
        reader = reader_of(Path(options.run_dir))
    except ValueError as error:
        sys.exit(f"lightning-lowrank: {error}")
    if asked.subcommand == "report":
        try:
            _write_page(reader, Path(options.run_dir), Path(options.output), options.samples)
        except OSError as error:
            sys.exit(f"lightning-lowrank: {options.output} cannot be written: {error.strerror}")
    else:
        _tell([_run(reader, name, series) for name, series in reader.runs().items()], as_json=options.json)


def page(reader: Reader, title: str, samples: int) -> str:
    """The tab as one file that needs no server and no other host."""
    # A site or a run may have any name: without "<" nothing in it can end the script element.
    content = json.dumps(_all_answers(reader, samples), allow_nan=False).replace("<", "\\u003c")
    return PAGE.format(title=html.escape(title), answers=content, module=answers.script())


def _parser() -> ArgumentParser:
    report, summary = (
        ArgumentParser(description=words)
        for words in ("The tab as one HTML file.", "Medians and the lowest sites, as a table.")
    )
    for parser in (report, summary):
        parser.add_argument("run_dir", type=str, help="a folder with event files, of one run or of several")
    report.add_argument("-o", "--output", type=str, default="report.html", help="the file to write")
    report.add_argument(
        "--samples", type=PositiveInt, default=answers.LIMIT, help="most samples of each quantity, evenly spread"
    )
    summary.add_argument("--json", action="store_true", help="numbers of all sites, null where there is none")
    whole = ArgumentParser(
        prog="lightning-lowrank",
        description="What lightning_lowrank has written beside a training, and what it will cost.",
    )
    commands = whole.add_subcommands()
    commands.add_subcommand("plan", command.parser())
    commands.add_subcommand("report", report)
    commands.add_subcommand("summary", summary)
    return whole


def reader_of(folder: Path) -> Reader:
    """All series below a folder.

    Raises:
        ValueError: There are none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give that of a run, or of several, in which the event files are")
    multiplexer = EventMultiplexer(tensor_size_guidance={"lowrank": 0})
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    reader = Reader(MultiplexerDataProvider(multiplexer, str(folder)), RequestContext(), "")
    if not reader.runs():
        there = [str(file.relative_to(folder)) for file in sorted(folder.rglob("events.out.tfevents.*"))[:3]]
        if not there:
            raise ValueError(
                f"{folder} has no event files: give the folder that TensorBoardLogger wrote to, or one above it"
            )
        raise ValueError(
            f"{folder} has event files, {there}, none with vectors of a monitor: was it trained with "
            "one and TensorBoardLogger?"
        )
    return reader


def _all_answers(reader: Reader, samples: int) -> list[dict[str, Any]]:
    """Every question that the page may ask, with its answer."""
    found: list[dict[str, Any]] = [{"route": "runs", "answer": answers.runs(reader, {})}]
    for run, series in reader.runs().items():
        found.append({"route": "texts", "run": run, "answer": answers.texts(reader, {"run": run})})
        for kind, name in series:
            asked = {"run": run, "kind": kind, "name": name}
            if kind in ("spectrum", "curve"):
                route = "spectra" if kind == "spectrum" else "curves"
                answer = answers.ANSWERS[route](reader, asked | {"limit": str(min(SPECTRA, samples))})
                found.append({"route": route, "run": run, "name": name, "answer": answer})
            else:
                found.append(
                    {"route": "matrix", **asked, "answer": answers.matrix(reader, asked | {"limit": str(samples)})}
                )
    return found


def _write_page(reader: Reader, folder: Path, output: Path, samples: int) -> None:
    output.write_text(page(reader, folder.resolve().name, samples), encoding="utf-8")
    rich.print(f"{output}: {len(reader.runs())} runs, {output.stat().st_size / 2**20:.1f} MiB")


def _run(reader: Reader, name: str, series: Mapping[tuple[str, str], Any]) -> Run:
    tables = {key: reader.table(name, parts) for key, parts in series.items() if key[0] not in ("spectrum", "curve")}
    tables = {key: table for key, table in tables.items() if len(table.steps)}
    first, latest = (
        _sample({quantity: table for (kind, quantity), table in tables.items() if kind == "vector"}, end)
        for end in (0, -1)
    )
    costs = _sample({key[1]: table for key, table in tables.items() if key[0] == "cost"}, -1)
    alerts = _sample({key[1]: table for key, table in tables.items() if key[0] == "alert"}, -1)
    # Several monitors of one run: what they take adds up.
    overhead = (
        math.fsum(cost.get("overhead_percent", math.nan) for cost in costs.values.values())
        if costs.values
        else math.nan
    )
    return Run(
        name,
        overhead,
        first,
        latest,
        {rule: state for states in alerts.values.values() for rule, state in states.items()},
    )


def _sample(tables: Mapping[str, Any], end: int) -> Sample:
    """What each quantity was at one end of its curve."""
    step = max((int(table.steps[end]) for table in tables.values()), default=0)
    rows = {
        name: dict(zip(table.sites, table.values[end].tolist(), strict=True)) for name, table in sorted(tables.items())
    }
    return Sample(step, rows)


def _tell(runs: Sequence[Run], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({run.label: _plain(run) for run in runs}, indent=2, allow_nan=False) + "\n")
        return
    for run in runs:
        rich.print(summary_table(_escaped(run)))
        firing = [escape(rule) for rule, state in run.alerts.items() if state >= 2]
        if firing:
            rich.print(f"firing: {', '.join(firing)}")


def _escaped(run: Run) -> Run:
    """Names may have brackets, which rich takes for markup."""

    def plain(sample: Sample | None) -> Sample | None:
        return sample and Sample(
            sample.step,
            {escape(q): {escape(site): value for site, value in row.items()} for q, row in sample.values.items()},
        )

    return Run(escape(run.label), run.overhead, plain(run.first), plain(run.latest), run.alerts)


def _plain(run: Run) -> dict[str, Any]:
    """Numbers as JSON has them: null where there is none."""
    ends = {"first": run.first or Sample(0, {}), "latest": run.latest or Sample(0, {})}
    said = {end: {"step": sample.step, "values": _finite(sample.values)} for end, sample in ends.items()}
    return {"overhead_percent": _finite(run.overhead), "alerts": _finite(run.alerts), **said}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return value if np.isfinite(value) else None


if __name__ == "__main__":
    main()
