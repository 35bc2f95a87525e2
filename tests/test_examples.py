"""Every example runs as a user would start it, for a few steps, and leaves what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
FEW_STEPS = {"char_transformer": ["--max_steps=52", "--batch_size=4"]}

# One worker, so that each example runs once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("examples")]


@pytest.fixture(scope="module", params=sorted(file.stem for file in (ROOT / "examples").glob("*.py")))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, EventAccumulator]:
    """What an example printed, and the event file that it wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, str(ROOT / "examples" / f"{request.param}.py"), *FEW_STEPS[request.param]]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (events,) = folder.glob("runs/**/events.out.tfevents.*")
    return done.stdout, EventAccumulator(str(events)).Reload()


def test_ends_with_the_ranks_and_how_to_see_more(run: tuple[str, EventAccumulator]) -> None:
    printed, _ = run

    for promised in ("gradient_stable_rank", "weight_stable_rank", "update_stable_rank", "lowest", "%", "tensorboard --logdir runs"):
        assert promised in printed


@pytest.mark.parametrize("source", ["gradient", "weight", "update"])
def test_tensorboard_has_the_curves(run: tuple[str, EventAccumulator], source: str) -> None:
    _, events = run
    ranks = {end: [event.value for event in events.Scalars(f"lowrank/{source}_stable_rank_{end}")] for end in ("min", "median", "max")}

    assert len(ranks["median"]) == 2
    assert all(1 <= low <= middle <= high for low, middle, high in zip(*ranks.values(), strict=True))
