"""Watching curvature changes nothing, bit for bit, at any level and in any kind of training."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from lightning_lowrank import CurvatureMonitor
from tests.trainings import CASES, COMPILED, Adversaries, Classifier, Recurrent, critic_loss, trained

LEVELS: dict[str, dict[str, Any]] = {
    "light": {"level": "light", "every_n_steps": 3},
    "standard": {"level": "standard", "every_n_steps": 7},
    "full, fixed": {"level": "full", "operators": ["hessian"], "batch": "fixed", "every_n_steps": 20},
}
EVERYWHERE = {case: both for case, both in CASES.items() if "optimizers" not in case} | {
    "LSTM": (lambda: Classifier(Recurrent()), dict)
}


def monitor_of(level: str, **options: Any) -> Any:
    # No alerts: torch's spectral norm holds its vectors fixed, so that its second derivative is said to be wrong, as it
    # is.
    return CurvatureMonitor(**({"top_k": 1, "alerts": None} | LEVELS[level] | options))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no number for 2 of 3 sites")  # spectral norm
@pytest.mark.parametrize("case", EVERYWHERE)
def test_training_is_the_same_at_every_level(case: str, tmp_path: Path) -> None:
    make, options = EVERYWHERE[case]
    without = trained(make, options(), [], tmp_path / "without")

    for level in LEVELS:
        monitor = monitor_of(level)
        assert_close(
            trained(make, options(), [monitor], tmp_path / level), without, rtol=0, atol=0, equal_nan=True, msg=level
        )
        assert monitor.latest is not None, level


@pytest.mark.parametrize("every", [1, 3])
def test_training_with_several_optimizers_is_the_same_on_its_live_graphs(every: int, tmp_path: Path) -> None:
    monitor = monitor_of("light")
    without = trained(lambda: Adversaries(every), {}, [], tmp_path / "without")

    assert_close(trained(lambda: Adversaries(every), {}, [monitor], tmp_path / "with"), without, rtol=0, atol=0)
    # The first loss of a step: the critic's, that has a square of its weights in it.
    assert monitor.latest is not None and monitor.latest.values["batch_sharpness"][""] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["standard", "full, fixed"])
def test_training_with_several_optimizers_is_the_same_with_a_loss_function(level: str, tmp_path: Path) -> None:
    monitor = monitor_of(level, loss_fn=critic_loss)
    without = trained(Adversaries, {}, [], tmp_path / "without")

    assert_close(trained(Adversaries, {}, [monitor], tmp_path / "with"), without, rtol=0, atol=0)
    assert monitor.latest is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("what", COMPILED)
def test_training_a_compiled_module_is_the_same_and_curvature_comes_from_a_replay(what: str, tmp_path: Path) -> None:
    make: Callable[[], Any] = lambda: COMPILED[what]("aot_eager")  # noqa: E731
    monitor = monitor_of("standard", operators=["hessian", "gauss_newton"])
    without = trained(make, {"max_epochs": 1}, [], tmp_path / "without")

    assert_close(trained(make, {"max_epochs": 1}, [monitor], tmp_path / "with"), without, rtol=0, atol=0)
    assert monitor.recorders[0].probe.source.facts()["replayed"] == 1.0
    assert monitor.failures == 0
    for quantity in (
        "batch_sharpness",
        "hessian_lambda_max",
        "hessian_trace",
        "gauss_newton_trace",
        "critical_sharpness",
    ):
        assert math.isfinite(monitor.latest.values[quantity][""]), quantity
