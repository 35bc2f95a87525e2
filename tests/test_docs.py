"""Every Python block of the documents runs, each on its own, in an empty folder."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
NOT_RUN = "# not run"


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


RUN = [pytest.param(*block, id=f"{block[0]}:{block[1] + 1}") for block in blocks() if not block[2].startswith(NOT_RUN)]


@pytest.mark.parametrize(("document", "before", "code"), RUN)
def test_block_runs(document: str, before: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    # Blank lines first, so that a traceback names the line of the document.
    exec(compile("\n" * before + code, document, "exec"), {"__name__": "__main__"})


def test_blocks_that_are_not_run_say_why() -> None:
    first_lines = [code.splitlines()[0] for _, _, code in blocks() if code.startswith(NOT_RUN)]

    assert [line for line in first_lines if not re.match(rf"{NOT_RUN}: \w+", line)] == []
