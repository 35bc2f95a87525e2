"""Fixtures of the tests."""

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """The one source of randomness of a test."""
    return torch.Generator().manual_seed(0)
