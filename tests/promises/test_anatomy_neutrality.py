"""Watching the anatomy of gradients changes nothing, bit for bit."""

from pathlib import Path

import pytest
from torch.testing import assert_close

from lightning_lowrank import GradientAnatomyMonitor
from tests.trainings import CASES, Checkpointed, Classifier, Recurrent, trained

# Of a parametrised layer the weight is no parameter, and there is no other.
EVERYWHERE = {case: both for case, both in CASES.items() if case != "spectral norm"}
EVERYWHERE |= {
    "reentrant checkpoint": (lambda: Classifier(Checkpointed(True)), dict),
    "LSTM": (lambda: Classifier(Recurrent()), dict),
}


@pytest.mark.parametrize("case", EVERYWHERE)
def test_training_is_the_same_with_a_monitor(case: str, tmp_path: Path) -> None:
    make, options = EVERYWHERE[case]
    monitor = GradientAnatomyMonitor(every_n_steps=3, max_rows=16, per_site=True)

    without = trained(make, options(), [], tmp_path / "without")
    assert_close(trained(make, options(), [monitor], tmp_path / "with"), without, rtol=0, atol=0, equal_nan=True)
    assert monitor.latest is not None and monitor.latest.values
    assert monitor.failures == 0
