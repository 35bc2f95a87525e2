"""HTML pages of commands: the page of the report, with numbers that do not come from event files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape
from torch.utils.tensorboard import SummaryWriter

from lightning_lowrank.analysis.page import page_of, reader_of
from lightning_lowrank.analysis.runs import write
from lightning_lowrank.reports.vectors import Row, Vectors

# Samples of a run, by where they stand.
Samples = Mapping[int, Sequence[Row]]


def draw(file: str, runs: Mapping[str, Samples]) -> None:
    """Write one HTML file with the charts of the report.

    Args:
        file: To write.
        runs: What the page shows as runs, by name: checkpoints, or lines between them.

    Raises:
        ValueError: It cannot be written.
    """
    with TemporaryDirectory() as folder:
        for number, (path, samples) in enumerate(runs.items()):
            writer, vectors = SummaryWriter(str(Path(folder) / f"{number}_{Path(path).name}")), Vectors()
            for step, rows in samples.items():
                vectors.draw(rows, step)(writer)
            writer.close()
        most = max(map(len, runs.values()))
        write(Path(file), page_of(reader_of(Path(folder)), Path(file).stem, most))
    Console(stderr=True).print(f"wrote {escape(file)}")


def numbers(source: str, rows: Mapping[str, Mapping[str, float]], units: Mapping[str, str] | None = None) -> list[Row]:
    """Numbers in the form that the page reads.

    Args:
        source: Name of their source on the page.
        rows: Name of a matrix (or of another object) -> quantity -> number.
        units: Units of quantities; the others have none.
    """
    names = dict.fromkeys(name for values in rows.values() for name in values)
    known = {"source": source, "level": "weights"}
    return [
        Row(
            "vector",
            f"{source}_{name}",
            {site: values[name] for site, values in rows.items() if name in values},
            {**known, "statistic": name, "unit": (units or {}).get(name, "1")},
        )
        for name in names
    ]
