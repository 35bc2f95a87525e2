"""Every example runs as a user would start it, for a few steps, and leaves what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
FEW_STEPS = {"char_transformer": ["--max_steps=52", "--batch_size=4"]}


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(file.stem for file in (ROOT / "examples").glob("*.py")))
def test_ends_with_the_ranks_and_leaves_the_curves(example: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py"), *FEW_STEPS[example]]

    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    for promised in ("lowest", "%", "tensorboard --logdir runs"):
        assert promised in done.stdout
    (events,) = tmp_path.glob("runs/**/events.out.tfevents.*")
    curves = EventAccumulator(str(events)).Reload()
    for source in ("gradient", "weight", "update"):
        assert f"{source}_stable_rank" in done.stdout
        low, middle, high = ([e.value for e in curves.Scalars(f"lowrank/{source}_stable_rank_{end}")] for end in ("min", "median", "max"))
        assert len(middle) == 2
        assert all(1 <= a <= b <= c for a, b, c in zip(low, middle, high, strict=True))
