"""Global variables that a training step names: state that no attribute leads to."""

import dis
import inspect
import queue
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from io import IOBase
from socket import socket
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Whatever is taken from them is gone.
SPENT = (Iterator, IOBase, socket, queue.Queue, queue.SimpleQueue)
STATE = (list, dict, set, deque, bytearray, Tensor, np.ndarray, torch.Generator, *SPENT)
# Where generators of random numbers are from.
GENERATORS = {"random", "numpy"}

# The namespace of a Python module, and a name in it.
Variable = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class Named:
    """Names in the code of a function and of those inside it.

    Attributes:
        read: Global variables.
        written: Those of them that it writes.
        attributes: What it asks objects for.
    """

    read: frozenset[str]
    written: frozenset[str]
    attributes: frozenset[str]


def variables(step: Any, owners: Iterable[type]) -> list[Variable]:
    """Global variables with state that a step names, or functions of the same Python file that it may call.

    Those are functions that it names, and methods whose names it has, each in turn; `forward` is always called.

    Args:
        step: A function or method.
        owners: Classes that may have the methods: those of the module and its layers.
    """
    function = inspect.unwrap(getattr(step, "__func__", step))
    if not isinstance(function, FunctionType):
        return []
    home = function.__module__
    kinds = {kind for owner in owners for kind in owner.__mro__ if kind.__module__ == home}
    waiting, seen = [function, *_methods(kinds, {"forward"})], set[int]()
    found: dict[str, Variable] = {}
    while waiting:
        here = waiting.pop()
        if not isinstance(here, FunctionType) or here.__module__ != home or id(here) in seen:
            continue
        seen.add(id(here))
        names = _named(here.__code__)
        waiting += _methods(kinds, names.attributes)
        for name in names.read & here.__globals__.keys():
            value = here.__globals__[name]
            waiting.append(value)
            if name in names.written or _is_state(value, home):
                found[name] = here.__globals__, name
    return list(found.values())


def _methods(kinds: Iterable[type], names: Iterable[str]) -> list[Any]:
    return [vars(kind)[name] for kind in kinds for name in names if name in vars(kind)]


def _is_state(value: Any, home: str) -> bool:
    """Whether it may change: a container, a generator, an object of a class of the same Python file."""
    origin = type(value).__module__
    return isinstance(value, STATE) or origin == home or origin.partition(".")[0] in GENERATORS


@cache
def _named(code: CodeType) -> Named:
    parts = [(part.opname, part.argval) for part in dis.get_instructions(code)]
    written = {name for kind, name in parts if kind == "STORE_GLOBAL"}
    read = {name for kind, name in parts if kind == "LOAD_GLOBAL"} | written
    attributes = {name for kind, name in parts if kind in ("LOAD_ATTR", "LOAD_METHOD")}
    inside = [_named(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return Named(
        frozenset(read).union(*(one.read for one in inside)),
        frozenset(written).union(*(one.written for one in inside)),
        frozenset(attributes).union(*(one.attributes for one in inside)),
    )
