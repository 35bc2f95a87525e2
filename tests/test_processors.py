"""The numerics on other processors: their instructions and numbers of threads, in processes of their own.

Products and decompositions round otherwise there. A law that holds on one processor and not on another hangs on last
bits.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# `MKL_ENABLE_INSTRUCTIONS` is heard on processors of Intel only, `MKL_CBWR` on all.
PROCESSORS = {
    "this one": {},
    "ATen without AVX": {"ATEN_CPU_CAPABILITY": "default"},
    "ATen with AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "MKL with SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL with AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "MKL_CBWR": "AVX2"},
    "MKL of any processor": {"MKL_CBWR": "COMPATIBLE"},
}
CORE = ["maths/test_decompose.py", "maths/test_sketch.py", "maths/test_spectrum.py", "maths/test_subspaces.py"]
NUMERICS = [
    *CORE,
    "statistics",
    *(
        "monitors/anatomy/test_split.py",
        "monitors/curvature/test_critical.py",
        "maths/test_flat_directions.py",
        "maths/test_eigenspaces.py",
        "monitors/concentration/test_gates.py",
        "monitors/concentration/test_inequality.py",
    ),
    *(
        "monitors/tangent_kernel/test_estimates.py",
        "monitors/tangent_kernel/test_kernels.py",
        "laws/test_laws.py",
        "monitors/concentration/test_masks.py",
        "maths/test_operators.py",
        "maths/test_order_statistics.py",
    ),
    *(
        "methods/test_regularisers.py",
        "maths/test_scaling.py",
        "laws/test_scaling_laws.py",
        "monitors/curvature/test_self_check.py",
        "monitors/curvature/test_stability.py",
    ),
    *("monitors/tangent_kernel/test_measurement.py", "test_theory.py", "maths/test_traces.py"),
]


def run(command, processor, threads):
    """What it prints, on that processor; a failure is one here."""
    # Numpy, the oracle, stays on one.
    number = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    environment = os.environ | PROCESSORS[processor] | number | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def hold(files, processor, threads, chosen=""):
    """The laws in those files."""
    run(
        ["-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-k", chosen, *(f"tests/{name}" for name in files)],
        processor,
        threads,
    )


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["ATen without AVX", "MKL of any processor"])
def test_laws_of_spectra_hold_on_other_processors(processor):
    hold(CORE, processor, 1)


@pytest.mark.slow
def test_laws_of_spectra_hold_on_two_threads():
    """Few of those of sketches: threads that wait for each other take minutes where the cores are busy with other
    tests.
    """
    hold(CORE, "this one", 2, "not test_sketch or orthonormal or (energy and not low_rank)")


@pytest.mark.evidence
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_laws_of_all_numerics_hold_on_other_processors(processor, threads):
    hold(NUMERICS, processor, threads)


def test_other_processors_round_otherwise():
    """Else the tests above would show nothing."""
    code = "import torch; a = torch.arange(1.0, 1e4).sin().view(99, 101); print((a @ a.mT).double().sin().sum().item())"
    printed = [
        run(["-c", code], processor, 1) for processor in ("this one", "ATen without AVX", "MKL of any processor")
    ]

    assert len(set(printed)) > 1
