"""A run that is killed with SIGKILL at random moments, and resumed from its last checkpoint each time until it ends."""

import math
import signal

import pytest

from tests.killed_runs import OUTSIDE, Evidence, drawn, evidence

pytestmark = pytest.mark.slow

KILLS = [
    pytest.param(drawn(5, seed=3), id="five"),
    pytest.param(drawn(20, seed=0), id="twenty", marks=pytest.mark.evidence),
]


@pytest.fixture(scope="module", params=KILLS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """What came of some kills."""
    return evidence(tmp_path_factory.mktemp("killed"), request.param)


def test_only_kills_end_a_process(found: Evidence) -> None:
    for run in (found.lived, found.unwatched):
        assert [life.exit_code for life in run] == [-signal.SIGKILL] * (len(run) - 1) + [0]
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


def test_kills_come_from_inside_and_from_outside() -> None:
    for kills in (parameters.values[0] for parameters in KILLS):
        assert [kill.moment for kill in kills].count(OUTSIDE) == len(kills) // 5
