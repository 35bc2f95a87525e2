"""The module that a checkpoint is of, without values: the user's own, or what a Hugging Face folder says."""

import json
import sys
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lowrank.models.checkpoints import Checkpoint


def module_of(checkpoint: Checkpoint, model: str | None) -> nn.Module | None:
    """The module on the "meta" device, so that its classes say how fused weights divide.

    Args:
        model: `module:function`, which is called without arguments; without it the `config.json` of a Hugging Face
            folder is read, if transformers is installed.

    Returns:
        None where neither says; names and shapes have to do.

    Raises:
        ValueError: There is no such function, or it makes no module.
    """
    if model is not None:
        made = call(model)
        if not isinstance(made, nn.Module):
            raise ValueError(f"{model} made a {type(made).__name__}; a torch.nn.Module was expected")
        return made
    return _of_config(checkpoint)


def call(place: str, *arguments: Any) -> Any:
    """What `module:function` returns, called with the "meta" device as torch's default.

    Raises:
        ValueError: There is no such function.
    """
    function = imported(place)
    with torch.device("meta"):
        return function(*arguments)


def imported(place: str) -> Any:
    """What stands at `module:name`; modules of the working directory count.

    Raises:
        ValueError: There is nothing.
    """
    path, colon, name = place.partition(":")
    if not colon or not path or not name:
        raise ValueError(f"{place!r}: give module:function, as in my_package.models:make")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(import_module(path), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{place}: {error}") from error


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
