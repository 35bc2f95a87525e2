"""A monitor can be copied, pickled and used again."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from torch.testing import assert_close

from tests.monitors import MONITORS, VARIANTS
from tests.trainings import logged

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda monitor: pickle.loads(pickle.dumps(monitor)),
}


CASES = [(how, name) for how in COPIES for name in MONITORS] + [("deepcopy", name) for name in VARIANTS]


@pytest.mark.parametrize(("how", "name"), CASES)
def test_a_copy_is_the_same_monitor_before_and_after_a_training(how: str, name: str) -> None:
    monitor = (MONITORS | VARIANTS)[name](every_n_steps=2 if name in MONITORS else 4)
    fresh = COPIES[how](monitor)
    first = logged([monitor])[0].numbers()
    used = COPIES[how](monitor)

    assert_close(logged([fresh])[0].numbers(), first, rtol=0, atol=0, equal_nan=True)
    assert_close(logged([used])[0].numbers(), first, rtol=0, atol=0, equal_nan=True)
    assert fresh.state_key == used.state_key == monitor.state_key
