"""Global variables that a training step names: state that no attribute leads to."""

import dis
import inspect
import queue
from collections import deque
from collections.abc import Iterator
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


def variables(step: Any, owner: type) -> list[Variable]:
    """Global variables with state that a step names, and that functions of the same Python module name which it may
    call: those named in turn, and methods of the owner's classes.

    Args:
        step: A function or method.
        owner: Class of the module that it belongs to.
    """
    function = inspect.unwrap(getattr(step, "__func__", step))
    if not isinstance(function, FunctionType):
        return []
    home = function.__module__
    methods = [value for kind in owner.__mro__ if kind.__module__ == home for value in vars(kind).values()]
    waiting, seen = [function, *methods], set[int]()
    found: dict[str, Variable] = {}
    while waiting:
        here = waiting.pop()
        if not isinstance(here, FunctionType) or here.__module__ != home or id(here) in seen:
            continue
        seen.add(id(here))
        for name, is_written in _named(here.__code__).items():
            value = here.__globals__.get(name)
            waiting.append(value)
            if is_written or _is_state(value, home):
                found[name] = here.__globals__, name
    return [variable for variable in found.values() if variable[1] in variable[0]]


def _is_state(value: Any, home: str) -> bool:
    """Whether it may change: a container, a generator, an object of a class of the same Python module."""
    origin = type(value).__module__
    return isinstance(value, STATE) or origin == home or origin.partition(".")[0] in GENERATORS


@cache
def _named(code: CodeType) -> dict[str, bool]:
    """Global names in a function and in those inside it, and whether they are written."""
    names: dict[str, bool] = {}
    for part in dis.get_instructions(code):
        if part.opname in ("LOAD_GLOBAL", "STORE_GLOBAL"):
            names[part.argval] = names.get(part.argval, False) or part.opname == "STORE_GLOBAL"
    for inside in (constant for constant in code.co_consts if isinstance(constant, CodeType)):
        names = {name: names.get(name, False) or written for name, written in (names | _named(inside)).items()}
    return names
