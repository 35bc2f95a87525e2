"""Build the site: the pages of `docs/`, a reference made from the public names and their docstrings, and the gallery's
report.

    python -m docs.site

A page, a link or a name that does not exist stops it. The site is in `site/`.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import lightning_lowrank
from lightning_lowrank import Monitor, statistics
from lightning_lowrank.analysis.cli import COMMANDS
from lightning_lowrank.analysis.runs import report

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api"

# The page of a public name, by the folder that it is from: the first that fits.
PAGES = {
    "methods": "Methods",
    "reports": "Alerts and tables",
    "watching": "Monitors",
    "statistics": "Statistics",
    "maths": "Spectra and scalings",
    "measuring.metrics": "Spectra and scalings",
}


def page_of(name: str) -> str:
    """Where the reference explains a public name."""
    value = getattr(lightning_lowrank, name)
    folder = str(value.__module__).removeprefix("lightning_lowrank.")
    for beginning, page in PAGES.items():
        if folder.startswith(beginning):
            return page
    if name.endswith("Alert"):
        return "Alerts and tables"
    return "Monitors" if isinstance(value, type) and issubclass(value, Monitor) else "Sources and schedules"


def reference() -> dict[str, list[str]]:
    """The names that each page of the reference explains, as Python finds them."""
    pages: dict[str, list[str]] = defaultdict(list)
    for name in lightning_lowrank.__all__:
        if name != "statistics":
            pages[page_of(name)].append(f"lightning_lowrank.{name}")
    pages["Statistics"] += [f"lightning_lowrank.statistics.{name}.{name}" for name in statistics.available()]
    pages["Commands"] = [
        f"lightning_lowrank.analysis.{file}.{re.sub('[ -]', '_', name)}" for name, (file, _) in COMMANDS.items()
    ]
    return pages


def registry() -> str:
    """What the registry knows of each statistic, as a table."""
    known = [statistics.find(name) for name in statistics.available()]
    rows = [f"| `{one.name}` | {one.unit} | {one.needs} | {'yes' if one.scale_free else 'no'} |" for one in known]
    return "\n".join(["| statistic | unit | reads | unchanged by scale |", "|---|---|---|---|", *rows, "\n"])


def write_reference() -> None:
    """One Markdown page per kind, on which mkdocstrings puts signatures and docstrings."""
    API.mkdir(exist_ok=True)
    for page, names in reference().items():
        table = registry() if page == "Statistics" else ""
        blocks = "\n".join(f"::: {name}" for name in names)
        (API / f"{page.lower().replace(' ', '-')}.md").write_text(f"# {page}\n\n{table}{blocks}\n")


def main() -> None:
    write_reference()
    gallery = ROOT / "docs" / "gallery"
    report(str(gallery / "runs"), output=str(gallery / "runs.html"), samples=20)
    sys.exit(subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
