"""The list of planted mistakes stays true to the code; `python -m tests.planted` runs it."""

from pathlib import Path

import pytest

import lightning_lowrank
from tests.planted import MISTAKES


@pytest.mark.parametrize("name", MISTAKES)
def test_every_planted_mistake_has_its_place(name: str) -> None:
    """The place of one was rewritten, and the mistake was planted nowhere."""
    file = Path(lightning_lowrank.__file__).parent / MISTAKES[name].file

    assert MISTAKES[name].planted(file.read_text()) is not None
