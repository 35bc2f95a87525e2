"""What the tests of a GPU need: the device, and data where scikit-learn is not installed."""

import argparse
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import tests.trainings

# "cpu" rehearses: the same code with the device's name changed.
DEVICE = os.environ.get("LOWRANK_TEST_DEVICE", "cuda")


def bytes_of_text(n: int = 64) -> TensorDataset:
    """Rows of 64 characters of Python's own source in 0..1, in place of digits; the label is the next one modulo 10."""
    text = Path(argparse.__file__).read_bytes()
    rows = torch.tensor(list(text[: 65 * n])).view(n, 65)
    return TensorDataset(rows[:, :64] / 255, rows[:, 64] % 10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all where there is no device."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device; LOWRANK_TEST_DEVICE=cpu rehearses"))


@pytest.fixture
def device() -> str:
    """Where monitors are tried."""
    return DEVICE


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits, or text where scikit-learn is not there."""
    if importlib.util.find_spec("sklearn") is None:
        monkeypatch.setattr(tests.trainings, "digits", bytes_of_text)


@pytest.fixture(autouse=True)
def same_bits() -> Iterator[None]:
    """Kernels that give the same bits each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
