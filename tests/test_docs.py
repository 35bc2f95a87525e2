"""Every Python block of the documents runs, each on its own, in an empty folder; every link leads somewhere; folders,
monitors and public names have their places.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from jsonargparse import auto_cli, capture_parser

import lightning_lowrank
from lightning_lowrank.reports.alerts.messages import PAGE
from tests.monitors import MONITORS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
NOT_RUN = "# not run"
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]*)\)")
SITE = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["site_url"]
HEADING = re.compile(r"^#+ (.*)$", re.M)
# Where one paragraph, item, row or heading ends and the next begins.
NEXT = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*#>]|\d+\.)\s)|\n(?=\|)|<br>")
END = re.compile(r"(?<=[.!?])(?<!\bal\.)[)\"*_]*\s+")
MOST_WORDS = 30
# A benchmark with its options: words, or a text in double quotes.
BENCHMARK = re.compile(r"python -m benchmarks\.(\w+)((?: +--[\w-]+(?: +(?![-#])(?:\"[^\"]*\"|[^\s`#)]+))?)+)")


def blocks() -> list[tuple[str, int, str]]:
    """Document, number of the line before the first, and code of each block."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        found += [
            (str(document.relative_to(ROOT)), text[: match.start(1)].count("\n"), match[1])
            for match in BLOCK.finditer(text)
        ]
    return found


def prose(document: Path) -> str:
    """Its text without blocks of code, in which brackets are no links and `#` begins a comment."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)


def sentences(text: str) -> list[str]:
    """Those of Markdown: each cell of a table on its own, code in a line as one word, links by their words."""
    text = re.sub(r"<!--.*?-->", "", re.sub(r"`[^`]+`", "code", text), flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = [re.sub(r"^([-*#>]+|\d+\.)\s", "", block.strip()) for block in NEXT.split(text)]
    parts = [part for block in blocks for part in (block.split("|") if block.startswith("|") else [block])]
    return [" ".join(sentence.split()) for part in parts for sentence in END.split(part)]


def too_long(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if len(sentence.split()) > MOST_WORDS]


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them: no punctuation, hyphens for spaces."""
    headings = (re.sub(r"\]\([^)]*\)", "", heading).lower() for heading in HEADING.findall(prose(document)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def leads_nowhere(document: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = document.parent / path if path else document
    return not target.exists() or (bool(anchor) and anchor not in anchors(target))


RUN = [pytest.param(*block, id=f"{block[0]}:{block[1] + 1}") for block in blocks() if not block[2].startswith(NOT_RUN)]


@pytest.mark.parametrize(("document", "before", "code"), RUN)
def test_block_runs(document: str, before: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    # Blank lines first, so that a traceback names the line of the document.
    exec(compile("\n" * before + code, document, "exec"), {"__name__": "__main__"})


def test_blocks_that_are_not_run_say_why() -> None:
    first_lines = [code.splitlines()[0] for _, _, code in blocks() if code.startswith(NOT_RUN)]

    assert [line for line in first_lines if not re.match(rf"{NOT_RUN}: \w+", line)] == []


def test_links_lead_to_files_and_headings_that_exist() -> None:
    links = [(document, link) for document in LINKED for link in LINK.findall(prose(document))]

    assert len(links) > 100
    assert [f"{document.relative_to(ROOT)}: {link}" for document, link in links if leads_nowhere(document, link)] == []


def test_links_of_the_readme_lead_to_pages_of_the_site() -> None:
    """They are absolute, as PyPI shows the README without the files beside it."""
    readme = ROOT / "README.md"
    paths = re.findall(rf"\]\({SITE}([^)#]*)", readme.read_text())

    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / "docs" / re.sub("/$", ".md", path)).exists()] == []


def test_no_sentence_is_too_long_to_read_once() -> None:
    written = [document for document in LINKED if document.parent.name != "api"]
    long = {str(document.relative_to(ROOT)): too_long(prose(document)) for document in written}

    assert sum(len(sentences(prose(document))) for document in written) > 5000
    assert {name: found for name, found in long.items() if found} == {}


@pytest.mark.parametrize(
    "place", ["{}", "- One.\n- {}\n- Two.", "| a | {} |\n|---|---|", "One (two). {} Three.", "# {}"]
)
def test_a_sentence_that_is_too_long_is_found_wherever_it_stands(place: str) -> None:
    words = " ".join(["word"] * MOST_WORDS)

    assert too_long(place.format(f"{words}.")) == []
    assert len(too_long(place.format(f"{words} more."))) == 1


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_pages_that_messages_send_to_exist() -> None:
    page = ROOT / "docs" / re.sub("/$", ".md", PAGE.removeprefix(SITE))

    assert "when-one-fires" in anchors(page)


def test_the_tour_has_a_row_for_each_folder_of_the_package() -> None:
    package = ROOT / "lightning_lowrank"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}

    assert set(re.findall(r"^\| `(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)) == folders


def test_each_monitor_has_a_page_that_shows_it() -> None:
    folders = ("monitors", "methods")
    pages = {path: path.read_text() for folder in folders for path in (ROOT / "docs" / folder).glob("*.md")}
    monitors = {type(make()).__name__ for make in MONITORS.values()}

    assert {name for name in monitors if sum(f"`{name}` answers" in text for text in pages.values()) != 1} == set()


def test_the_page_of_each_monitor_has_a_picture_formulas_and_pitfalls() -> None:
    parts = ("![", "## An example", "## What it writes", "## Quantities", "## When they mislead", "## Cost and cadence")
    pages = {page.name: page.read_text() for page in (ROOT / "docs" / "monitors").glob("*.md")}

    assert len(pages) >= 15
    assert {
        name: missing for name, text in pages.items() if (missing := [part for part in parts if part not in text])
    } == {}


def test_each_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()

    assert [name for name in lightning_lowrank.__all__ if not re.search(rf"`{name}\b", reference)] == []


def test_files_that_the_documents_name_exist() -> None:
    named = [
        (document, path)
        for document in LINKED
        for path in re.findall(r"\b(?:tests|examples|benchmarks|lightning_lowrank)/[\w/]+\.pyi?\b", prose(document))
    ]

    assert len(named) > 20
    assert [f"{document.relative_to(ROOT)}: {path}" for document, path in named if not (ROOT / path).exists()] == []


def test_the_site_builds_without_a_link_or_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("api"))
    shutil.copytree(ROOT / "lightning_lowrank", tmp_path / "lightning_lowrank")
    shutil.copy(ROOT / "zensical.toml", tmp_path)

    built = subprocess.run([sys.executable, "-m", "docs.site"], cwd=tmp_path, capture_output=True, text=True)

    assert built.returncode == 0, built.stdout + built.stderr
    names = set(lightning_lowrank.__all__) - {"statistics"}
    explained = "".join(page.read_text() for page in (tmp_path / "site" / "api").rglob("index.html"))
    assert not [name for name in names if f'id="lightning_lowrank.{name}"' not in explained]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "zensical.toml").read_text()

    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if f'"{page}"' not in navigation and not page.startswith("api/")]


def commands() -> list[tuple[str, str]]:
    """Benchmarks that documents and benchmarks name with options, where those are read from a function."""
    files = [*LINKED, *(ROOT / "benchmarks").glob("*.py")]
    found = {match.groups() for file in files for match in BENCHMARK.finditer(file.read_text())}
    return sorted((n, o) for n, o in found if "auto_cli(main)" in (ROOT / "benchmarks" / f"{n}.py").read_text())


@pytest.mark.parametrize(("name", "options"), commands())
def test_benchmarks_take_the_options_that_documents_give_them(name: str, options: str) -> None:
    main, words = import_module(f"benchmarks.{name}").main, shlex.split(options)

    capture_parser(lambda: auto_cli(main, args=words)).parse_args(words)  # exits where it does not
