"""Names of places in a module: cleaned so that they can be tags, and found by the patterns that users write."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import translate
from functools import cache
from itertools import chain, count

from torch import nn

from lightning_lowrank.models.effective_weights import hooked

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")


@cache
def tag(name: str) -> str:
    """The name without wrappers' prefixes, in characters that a tag may have."""
    return re.sub(r"[^A-Za-z0-9_./-]", "_", re.sub(r"^(module\.)+", "", WRAPPERS.sub("", name)))


def tags(names: Iterable[str]) -> dict[str, str]:
    """Tags by name. Names with the same tag are numbered from the second on: `a_b`, `a_b_2`."""
    given: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        clean = tag(name)
        given[name] = next(t for t in chain([clean], (f"{clean}_{n}" for n in count(2))) if t not in taken)
        taken.add(given[name])
    return given


def fitting(argument: str, patterns: str | Sequence[str], layers: Mapping[str, nn.Module]) -> set[str]:
    """The names that one of the patterns fits: a glob, `re:` and a regular expression, or `type:` and a class of the
    layer.

    Args:
        argument: What the user calls the patterns: the beginning of the message.
        layers: For each name the layer behind it.

    Raises:
        ValueError: A pattern matches nothing; the message has the nearest names and some of what there is.
    """
    found: set[str] = set()
    several = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(several, Sequence) or not all(isinstance(pattern, str) for pattern in several):
        raise ValueError(
            f"{argument}={patterns!r} must be a pattern or a list of patterns: globs, 're:REGEX' or 'type:LAYERCLASS'"
        )
    for pattern in several:
        test = _test(argument, pattern)
        hits = {name for name, layer in layers.items() if test(name, layer)}
        if not hits:
            raise ValueError(f"{argument}: {pattern!r} matches nothing; {_what_there_is(pattern, layers)}")
        found |= hits
    return found


def chosen_parameters(
    module: nn.Module, match: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> dict[str, nn.Parameter]:
    """The parameters that `match` matches (all by default), without those that `exclude` matches, by tag.

    A pattern for a hooked weight (pruned, or with the older norms) also matches the parameter from which it is
    computed. The original of a pruned weight has the name of the weight, so pruning in mid-run changes no name.

    Raises:
        ValueError: A pattern matches nothing.
    """
    named = dict(module.named_parameters())
    layers = {name: module.get_submodule(name.rpartition(".")[0]) for name in named}
    used = {name: _used(name, layer) for name, layer in layers.items()}
    known = layers | {used[name][0]: layer for name, layer in layers.items()}
    wanted = set(known) if match is None else fitting("match", match, known)
    unwanted = set() if exclude is None else fitting("exclude", exclude, known)
    labels = tags(weight if pruned else name for name, (weight, pruned) in used.items())
    chosen = {}
    for name, parameter in named.items():
        weight, pruned = used[name]
        if not wanted.isdisjoint({name, weight}) and unwanted.isdisjoint({name, weight}):
            chosen[labels[weight if pruned else name]] = parameter
    return chosen


def _used(name: str, layer: nn.Module) -> tuple[str, bool]:
    """The name of the weight that a parameter is an original of, or its own; and whether that is pruned."""
    path, dot, local = name.rpartition(".")
    computation = hooked(layer).get(local)
    return (name, False) if computation is None else (path + dot + computation.local, computation.is_pruned)


def _test(argument: str, pattern: str) -> Callable[[str, nn.Module], bool]:
    """Whether a pattern fits a name or the layer behind it."""
    kind, _, rest = pattern.partition(":")
    if kind == "type":
        return lambda name, layer: any(cls.__name__ == rest for cls in type(layer).__mro__)
    try:
        search = re.compile(rest).search if kind == "re" else re.compile(translate(pattern)).match
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from error
    return lambda name, layer: search(name) is not None or search(tag(name)) is not None


def _what_there_is(pattern: str, layers: Mapping[str, nn.Module]) -> str:
    """What a pattern might have meant, and the beginning of the list of what it could fit."""
    kind, _, rest = pattern.rpartition(":")
    names = [type(layer).__name__ for layer in layers.values()] if kind == "type" else [tag(name) for name in layers]
    names = list(dict.fromkeys(names))
    if not names:
        return "there is nothing to choose from"
    nearest = get_close_matches(rest.strip("*"), names, 3, cutoff=0)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"nearest: {nearest}; available: {names[:10]}{more}"
