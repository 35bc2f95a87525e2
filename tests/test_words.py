"""No docstring and no message of the package has a sentence that takes a second reading, by its length."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_lowrank"
MOST_WORDS = 30
# Where one paragraph, item, entry or row ends and the next begins.
NEXT = re.compile(r"\n\s*\n|\n(?=\s*- )|\n(?=\|)|\n(?= *[\w*`]+: )|\n(?= *(?:Args|Attributes|Raises|Returns):\n)")
END = re.compile(r"(?<=[.!?])(?<!\bal\.)(?<!\bvs\.)[)\"*_]*\s+|(?<=:)\n")
# Code, legends and citations are no sentences, and neither are lists of names.
LEFT_OUT = re.compile(r"^Shape letters: .*(?:\n.+)*|^(?:Examples|References):\n(?: .*\n?|\n)*", re.M)
PROSE = re.compile(r"\b[a-z]+ [a-z]+\b")


def sentences(text: str) -> list[str]:
    """Those of a docstring or a message; code is one word, each cell of a table stands on its own."""
    text = re.sub(r"`[^`]+`", "code", LEFT_OUT.sub("", text))
    blocks = [part.strip() for part in NEXT.split(text)]
    parts = [cell for block in blocks for cell in (block.split("|") if block.startswith("|") else [block])]
    return [" ".join(sentence.split()) for part in parts for sentence in END.split(part)]


def too_long(text: str) -> list[str]:
    long = [sentence for sentence in sentences(text) if len(re.findall(r"\S*\w\S*", sentence)) > MOST_WORDS]
    return [sentence for sentence in long if PROSE.search(sentence)]


def documented(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """A module with its public classes, functions and methods."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        yield node
    if not isinstance(node, ast.FunctionDef):
        for child in ast.iter_child_nodes(node):
            if not getattr(child, "name", "").startswith("_"):
                yield from documented(child)


def docstrings(tree: ast.Module) -> list[str]:
    return [inspect.cleandoc(text) for node in documented(tree) if (text := ast.get_docstring(node))]


def messages(node: ast.AST) -> Iterator[str]:
    """Strings with words; what is put into one counts as a word. Templates of several lines are none."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "value" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from messages(child)


def test_no_docstring_and_no_message_has_a_sentence_that_is_too_long() -> None:
    trees = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    texts = {name: [*docstrings(tree), *messages(tree)] for name, tree in trees.items()}

    long = {name: [sentence for text in some for sentence in too_long(text)] for name, some in texts.items()}
    assert sum(len(sentences(text)) for some in texts.values() for text in some) > 5000
    assert {name: found for name, found in long.items() if found} == {}


@pytest.mark.parametrize(
    "source",
    [
        'class Public:\n    """{}"""',
        'class Public:\n    def method(self):\n        """First.\n\n        {}\n        """',
        'def public():\n    """First.\n\n    Args:\n        one: {}\n        two: Short.\n    """',
        'def f(x):\n    raise ValueError(f"{{x}} is wrong. {}")',
        'def f():\n    warn("Is it? " "{}")',
        'COMMANDS = {{"one": ("file", "{}")}}',
    ],
)
def test_a_sentence_that_is_too_long_is_found_wherever_it_stands(source: str) -> None:
    words = " ".join(["word"] * (MOST_WORDS - 1))
    fits, long = (ast.parse(source.format(f"{words}{more}.")) for more in ("", " and more"))

    assert [found for text in (*docstrings(fits), *messages(fits)) for found in too_long(text)] == []
    assert len([found for text in (*docstrings(long), *messages(long)) for found in too_long(text)]) == 1
