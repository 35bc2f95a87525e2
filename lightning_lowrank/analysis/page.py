"""TensorBoard's tab as a single HTML file that needs no server, and other pages with its charts."""

import html
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext

from lightning_lowrank.analysis.plain_json import as_json
from lightning_lowrank.tensorboard import answers
from lightning_lowrank.tensorboard.event_files import EventFiles
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
<script type="application/json" id="answers">{content}</script>
<script type="module">
{module}
{call}(JSON.parse(document.getElementById("answers").textContent));
</script>
</body>
</html>
"""

# Spectra are long: as many as can be told apart in one chart.
SPECTRA = 40


def _on_console(said: str) -> None:
    sys.stderr.write(f"lightning-lowrank: {said}\n")


def reader_of(folder: Path, warn: Callable[[str], object] = _on_console) -> Reader:
    """All series below a folder.

    Args:
        folder: Of a run or of several.
        warn: What to do with a sentence about a damaged event file.

    Raises:
        ValueError: There are no event files.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder with the event files of a run or of several")
    multiplexer = EventMultiplexer(tensor_size_guidance={"lowrank": 0})
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    reader = Reader(MultiplexerDataProvider(multiplexer, str(folder)), RequestContext(), "", EventFiles(folder))
    for run in reader.started():
        for said in reader.damage(run):
            warn(f"{folder}: {said}")
    if not reader.runs():
        there = [str(file.relative_to(folder)) for file in sorted(folder.rglob("events.out.tfevents.*"))[:3]]
        if not there:
            raise ValueError(
                f"{folder} has no event files; give the folder that TensorBoardLogger wrote to, or a folder above it"
            )
        raise ValueError(
            f"{folder} has event files, {there}, but none with vectors of a monitor. Did the training have a "
            "monitor and a TensorBoardLogger?"
        )
    return reader


def page_of(reader: Reader, title: str, samples: int) -> str:
    """The tab as a single file that needs neither a server nor another host."""
    return called("report", _all_answers(reader, samples), title)


def called(function: str, known: Any, title: str) -> str:
    """A page that calls a function of our scripts with the given content."""
    # A site or a run may have any name: without "<" nothing in it can end the script element.
    content = as_json(known).replace("<", "\\u003c")
    return PAGE.format(title=html.escape(title), content=content, module=answers.script(), call=function)


def _all_answers(reader: Reader, samples: int) -> list[dict[str, Any]]:
    """Every question that the page may ask, with its answer."""
    found: list[dict[str, Any]] = [{"route": "runs", "answer": answers.runs(reader, {})}]
    for run, series in reader.runs().items():
        for route in ("diagnosis", "texts"):
            found.append({"route": route, "run": run, "answer": answers.ANSWERS[route](reader, {"run": run})})
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
