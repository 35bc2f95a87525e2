"""The tests and the benchmark of a GPU run on a CPU: the same code with the device's name changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*args: str) -> str:
    """What a process said that must end well."""
    asked = {**os.environ, "LOWRANK_TEST_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *args], capture_output=True, text=True, cwd=ROOT, env=asked, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


@pytest.mark.evidence
def test_the_tests_of_a_gpu_pass_on_a_cpu() -> None:
    assert " passed" in run("pytest", "-q", "-c", "tests/gpu/pytest.ini", "tests/gpu")


@pytest.mark.evidence
def test_the_benchmark_of_a_gpu_writes_its_page(tmp_path: Path) -> None:
    run("benchmarks.gpu", "--device", "cpu", "--small", "--steps", "6", "--out", str(tmp_path))

    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not [row for row in found["Spectra"] + found["Trainings"] if "trouble" in row]
    assert "| rank | False |" in (tmp_path / "gpu.md").read_text()
