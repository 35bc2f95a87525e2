"""Calls with wrong shapes or types end a test."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.typechecks import check_types

MODULE = """
from dataclasses import dataclass
from jaxtyping import Float
from torch import Tensor

def product(a: Float[Tensor, "m n"], b: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
    return (a @ b).mT

def count(number: int) -> str:
    return number

class Holder:
    def __init__(self, number: int) -> None:
        self.number = number

@dataclass
class Pair:
    first: Float[Tensor, " n"]
    second: Float[Tensor, " n"]
"""


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "checked_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    check_types("checked_module")
    return importlib.import_module("checked_module")


CALLS = {
    "an argument of another shape": lambda module: module.product(torch.ones(2, 3), torch.ones(2, 3)),
    "a result of another shape": lambda module: module.product(torch.ones(2, 3), torch.ones(3, 4)),
    "an argument of another type": lambda module: module.count("one"),
    "a result of another type": lambda module: module.count(1),
    "an argument of a method": lambda module: module.Holder("one"),
    "fields of a dataclass": lambda module: module.Pair(torch.ones(2), torch.ones(3)),
}


@pytest.mark.parametrize("case", CALLS)
def test_what_is_not_as_annotated_raises(case: str, checked: Any) -> None:
    with pytest.raises(Exception, match=r"Type-check error|[Vv]iolates type hint"):
        CALLS[case](checked)


def test_a_right_call_gives_its_result(checked: Any) -> None:
    assert checked.product(torch.ones(2, 2), torch.ones(2, 2)).shape == (2, 2)
