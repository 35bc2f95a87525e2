"""What a linter cannot see: where the host reads the device, what draws at random, how long things are, what importing
costs.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lowrank
from lightning_lowrank import statistics
from lightning_lowrank.statistics.registry import REGISTERED

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_lowrank"
FILES = sorted(PACKAGE.rglob("*.py"))

# They work on what was moved to the host already, or move it themselves, all at once.
MAY_READ_THE_DEVICE = ("analysis", "methods", "tensorboard")
HOST_READS = {"item", "tolist", "cpu", "numpy"}
DRAWS = {
    *(
        "bernoulli",
        "bernoulli_",
        "cauchy_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "multinomial",
        "normal",
        "normal_",
        "poisson",
    ),
    *("rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm", "uniform_"),
}


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call of a method or function of a module, under its last name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr, node


def at(file: Path, node: ast.expr | ast.stmt) -> str:
    return f"{file.relative_to(ROOT)}:{node.lineno}"


def test_the_host_reads_the_device_in_few_places() -> None:
    watched = [
        file
        for file in FILES
        if file.relative_to(PACKAGE).parts[0] not in MAY_READ_THE_DEVICE and file.name != "loggers.py"
    ]

    assert [f"{at(file, call)} {name}" for file in watched for name, call in calls(file) if name in HOST_READS] == []


def test_every_random_draw_names_its_generator() -> None:
    draws = [(file, call) for file in FILES for name, call in calls(file) if name in DRAWS]

    assert [
        at(file, call) for file, call in draws if "generator" not in {keyword.arg for keyword in call.keywords}
    ] == []


def test_nothing_draws_from_the_generators_of_python_or_numpy() -> None:
    # To put back what a user's parametrization drew is no draw; a replay seeds them for the user's own step.
    generators = re.compile(
        r"\brandom\.(?!getstate|setstate|fork_rng)\w+\(|^\s*from random\b|\b(np|numpy)\.random\b", re.M
    )

    assert [file.name for file in FILES if file.name != "replay.py" and generators.search(file.read_text())] == []


def test_every_statistic_is_registered_under_the_name_of_its_file() -> None:
    files = {file.stem for file in (PACKAGE / "statistics").glob("*.py")} - {"__init__", "registry"}

    assert {
        name for name, found in REGISTERED.items() if found.function.__module__ == f"{statistics.__name__}.{name}"
    } == files


def test_functions_are_at_most_40_lines_long() -> None:
    """Without signature and docstring: the arguments of a monitor take a line each."""
    functions = (
        (f, n)
        for f in FILES
        for n in ast.walk(ast.parse(f.read_text()))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )

    assert [f"{at(file, node)} {node.name}" for file, node in functions if num_lines(node) > 40] == []


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_files_are_at_most_400_lines_long() -> None:
    """From 300 lines on, ask whether a file holds two ideas; it is split by idea and not for this number."""
    assert [str(file.relative_to(ROOT)) for file in FILES if len(file.read_text().splitlines()) > 400] == []


@pytest.mark.parametrize("heavy", ["torch", "lightning", "numpy"])
def test_importing_the_package_leaves_heavy_imports_for_later(heavy: str) -> None:
    code = f"import lightning_lowrank, sys; sys.exit({heavy!r} in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", lightning_lowrank.__all__)
def test_a_public_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    assert getattr(lightning_lowrank, name).__doc__


def test_public_names_are_sorted() -> None:
    assert lightning_lowrank.__all__ == sorted(lightning_lowrank.__all__)


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)

    assert versions[0] == lightning_lowrank.__version__


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_no_test_module_imports_another() -> None:
    """What several need is in a module of its own: `tests/trainings.py`, `tests/monitors`, `tests/processes.py`."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    modules = ((file, node) for file in files for node in ast.walk(ast.parse(file.read_text())))
    imports = [(f, n) for f, n in modules if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [(f, n, [getattr(n, "module", None) or "", *(alias.name for alias in n.names)]) for f, n in imports]

    assert len(imports) > len(files) > 90
    assert [at(f, n) for f, n, parts in names if any(".test_" in f".{part}" for part in parts)] == []
