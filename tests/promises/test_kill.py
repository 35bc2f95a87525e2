"""A run that is killed with SIGKILL at random moments, and resumed from its last checkpoint each time until it ends."""

import math
import signal

import pytest

from tests.killed_runs import OUTSIDE, Evidence, drawn, evidence

pytestmark = pytest.mark.slow

KILLS = drawn(5, seed=3)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """What came of five kills."""
    return evidence(tmp_path_factory.mktemp("killed"), KILLS)


def test_only_kills_end_a_process(found: Evidence) -> None:
    assert [kill.moment for kill in KILLS].count(OUTSIDE) == 1
    for run in (found.lived, found.unwatched):
        assert [life.exit_code for life in run] == [-signal.SIGKILL] * len(KILLS) + [0]
    assert found.failures == 0


def test_no_point_before_a_checkpoint_is_lost_or_doubled(found: Evidence) -> None:
    assert found.points > 1000
    assert (found.lost, found.doubled) == (0, 0)


def test_final_weights_are_those_of_an_unwatched_run_killed_at_the_same_steps(found: Evidence) -> None:
    assert [life.resumed for life in found.lived] == [life.resumed for life in found.unwatched]
    assert found.same


def test_what_a_sample_is_compared_with_outlives_the_kill(found: Evidence) -> None:
    tag = "gradient_subspace_overlap/net.0.weight"
    gaps = [
        (life.resumed, step) for life in found.lived for step, value in life.curves.get(tag, []) if math.isnan(value)
    ]

    assert set(gaps) == {(0, 0)}
