"""Every example runs as a user would start it, for a few steps, and leaves what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
FEW_STEPS = {
    "char_transformer": (["--max_steps=52", "--batch_size=4"], ["lowest", "%", "tensorboard --logdir runs"]),
    "edge_of_stability": (["--share=0.03"], ["largest eigenvalue, preconditioned", "edge_of_stability.png"]),
    "multifractal_training": (["--share=0.003"], ["entries shuffled", "beyond chance", "multifractal.png"]),
    "grokking": (["--max_steps=30"], ["%"]),
}


def run(example: str, folder: Path) -> str:
    """What it says."""
    arguments, promises = FEW_STEPS[example]
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py"), *arguments]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(promised in done.stdout for promised in promises), done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(file.stem for file in (ROOT / "examples").glob("*.py")))
def test_says_what_it_promises(example: str, tmp_path: Path) -> None:
    run(example, tmp_path)


@pytest.mark.slow
def test_the_demo_ends_with_the_ranks_and_leaves_the_curves(tmp_path: Path) -> None:
    said = run("char_transformer", tmp_path)

    (events,) = tmp_path.glob("runs/**/events.out.tfevents.*")
    curves = EventAccumulator(str(events)).Reload()
    for source in ("gradient", "weight", "update"):
        assert f"{source}_stable_rank" in said
        low, middle, high = ([e.value for e in curves.Scalars(f"lowrank/{source}_stable_rank_{end}")] for end in ("min", "median", "max"))
        assert len(middle) == 2
        assert all(1 <= a <= b <= c for a, b, c in zip(low, middle, high, strict=True))
