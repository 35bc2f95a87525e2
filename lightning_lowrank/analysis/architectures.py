"""The module that belongs to a checkpoint, without values: from the user's function, or from a Hugging Face folder."""

import json
import sys
from collections.abc import Callable
from importlib import import_module, util
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lowrank.models.checkpoints import Checkpoint


def module_of(checkpoint: Checkpoint, model: str | None) -> nn.Module | None:
    """The module on the "meta" device; its classes tell how fused weights are split.

    Args:
        model: `module:function`, called without arguments. Without it, the `config.json` of a Hugging Face folder is
            read if transformers is installed.

    Returns:
        None if there is neither; then only names and shapes are known.

    Raises:
        ValueError: There is no such function, or it returns no module.
    """
    if model is not None:
        made = call(model)
        if not isinstance(made, nn.Module):
            raise ValueError(f"{model} returned a {type(made).__name__}; expected a torch.nn.Module")
        return made
    return _of_config(checkpoint)


def call(place: str) -> Any:
    """What `module:function` returns, called with the "meta" device as torch's default.

    Raises:
        ValueError: There is no such function, it takes arguments, or it raises.
    """
    function = imported(place)
    with torch.device("meta"):
        return called(place, function)


def called(place: str, function: Callable[..., Any], *arguments: int) -> Any:
    """What the user's function returns.

    Raises:
        ValueError: It does not take these arguments, or it raises.
    """
    try:
        signature(function).bind(*arguments)
    except TypeError as error:
        words = f"with {', '.join(map(str, arguments))}" if arguments else "without arguments"
        raise ValueError(f"{place} cannot be called {words}: {error}") from error
    try:
        return function(*arguments)
    except Exception as error:  # the user's own code
        raise ValueError(f"{place} raised {type(error).__name__}: {error}") from error


def imported(place: str) -> Any:
    """The function `module:function`; modules of the working directory count.

    Raises:
        ValueError: There is no such function; the message lists those that exist.
    """
    path, colon, name = place.partition(":")
    if not (path and colon and name):
        raise ValueError(f"{place!r}: expected module:function, such as my_package.models:gpt2")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` has it
        sys.path.insert(0, here)
    try:
        module = import_module(path)
    except ImportError as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{path} has no function {name!r}; it has {there[:20]}")
    return function


def _of_config(checkpoint: Checkpoint) -> nn.Module | None:
    """What transformers makes of the folder's configuration, where its names are those of the file."""
    config = checkpoint.folder / "config.json"
    if not config.is_file() or util.find_spec("transformers") is None:
        return None
    import transformers

    try:
        architectures = json.loads(Path(config).read_text(encoding="utf-8")).get("architectures") or []
        settings = transformers.AutoConfig.from_pretrained(checkpoint.folder)
        with torch.device("meta"):
            made: nn.Module = getattr(transformers, architectures[0])(settings)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OSError, ImportError):
        return None  # it only helps with views
    shapes = {name: parameter.shape for name, parameter in made.named_parameters()}
    return made if all(checkpoint.shapes.get(name) == shape for name, shape in shapes.items()) else None
