"""The numerics on other processors: no result may hang on one instruction set, or on the number of threads.

Each setting runs the tests of numerics anew in a process of its own, as a machine without these instructions would.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, dict[str, str]] = {
    "no vector instructions": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "two threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
}
# What was found to hang on the last bits, and what stands for the rest.
FEW = [
    "tests/maths/test_sketch.py::test_truth_is_within_the_reported_error",
    "tests/maths/test_sketch.py::test_energy_is_exact",
    "tests/maths/test_decompose.py",
    "tests/maths/test_spectrum.py",
]
ALL = ["tests/maths", "tests/laws", "tests/statistics", "tests/monitors/tangent_kernel/test_estimates.py"]


def run(tests: list[str], setting: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | SETTINGS[setting]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_numerics_do_not_hang_on_the_processor(setting: str) -> None:
    run(FEW, setting)


@pytest.mark.evidence
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_test_of_numerics_hangs_on_the_processor(setting: str) -> None:
    run(ALL, setting)
