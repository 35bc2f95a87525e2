"""Names of places in a module: cleaned so that they can be tags, and found by the patterns that users write."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from itertools import islice
from typing import TypeVar

from torch import nn

Key = TypeVar("Key")

WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
SHOWN = 12


@dataclass(frozen=True)
class Place:
    """Something that a pattern may fit.

    Attributes:
        names: The clean one, and those that PyTorch knows it by.
        layer: The layer that it is, or that owns it.
    """

    names: tuple[str, ...]
    layer: nn.Module


def clean(name: str) -> str:
    """The name without wrappers' prefixes, in characters that a tag may have."""
    return re.sub(r"[^A-Za-z0-9_./-]", "_", re.sub(r"^(module\.)+", "", WRAPPERS.sub("", name)))


def fitting(argument: str, patterns: str | Sequence[str], places: Mapping[Key, Place]) -> set[Key]:
    """Keys of the places that one of the patterns fits.

    Args:
        argument: What to call the patterns in an error.
        patterns: Globs on the full name, `re:` and a regular expression searched in it, or `type:` and the class of the layer or a base of it.
        places: What there is.

    Raises:
        ValueError: A pattern fits nothing, or is no regular expression.
    """
    found: set[Key] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        test = _test(argument, pattern)
        hits = {key for key, place in places.items() if test(place)}
        if not hits:
            raise ValueError(f"{argument}: {pattern!r} fits nothing; {_what_there_is(pattern, places)}")
        found |= hits
    return found


def _test(argument: str, pattern: str) -> Callable[[Place], bool]:
    kind, _, rest = pattern.partition(":")
    if kind == "type":
        return lambda place: any(cls.__name__ == rest for cls in type(place.layer).__mro__)
    try:
        search = re.compile(rest).search if kind == "re" else re.compile(translate(pattern)).match
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is no regular expression: {error}") from error
    return lambda place: any(search(name) for name in place.names)


def _what_there_is(pattern: str, places: Mapping[Key, Place]) -> str:
    names = [place.names[0] for place in places.values()]
    types = sorted({type(place.layer).__name__ for place in places.values()})
    near = get_close_matches(pattern.strip("*"), [*names, *(f"type:{t}" for t in types)], 3, 0.4)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"near it are {near}; " * bool(near) + f"there are {list(islice(names, SHOWN))}{more}, of types {types}"
