"""Arguments of monitors: kept to be shown, and refused in words where they are of a wrong type."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class Arguments:
    """Keeps the arguments that it is made with, by which it is shown.

    Raises:
        ValueError: One is not of the type that `__init__` is annotated with.
    """

    _args: tuple[Any, ...]
    _options: dict[str, Any]

    def __new__(cls, *args: Any, **options: Any) -> "Arguments":
        self = super().__new__(cls)
        self._args, self._options = args, options
        refuse_wrong_types(cls, args, options)
        return self

    def __repr__(self) -> str:
        given = [*map(repr, self._args), *(f"{name}={value!r}" for name, value in self._options.items())]
        return f"{type(self).__name__}({', '.join(given)})"


def refuse_wrong_types(kind: type, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Refuse arguments that do not fit the annotations of a class's `__init__`.

    Raises:
        ValueError: It names the argument and what it may be.
    """
    try:
        given = inspect.signature(kind.__init__).bind(None, *args, **options).arguments  # type: ignore[misc]
        hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    except (TypeError, NameError):  # Python says what is missing or unknown; a user's class may have riddles for hints
        return
    for name, value in given.items():
        if name in hints and not fits(value, hints[name]):
            raise ValueError(f"{kind.__name__}({name}={value!r}): {name} is {_in_words(hints[name])}")


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type. A bool is no number, a number of numpy is one; a string is no sequence."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str | bytes) and _all_fit(value, parts[0])
    if origin is Mapping:
        return isinstance(value, Mapping) and _all_fit(value, parts[0]) and _all_fit(value.values(), parts[1])
    return callable(value) if origin is Callable else isinstance(value, origin or hint)


def _all_fit(values: Any, hint: Any) -> bool:
    return all(fits(value, hint) for value in values)


def _in_words(hint: Any) -> str:
    """A type as a sentence has it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, parts)))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Sequence:
        return f"a sequence of [{_in_words(parts[0])}]"
    if origin is Mapping:
        return f"a mapping of [{_in_words(parts[0])}] to [{_in_words(parts[1])}]"
    if origin is Callable:
        return "a function"
    known = {NoneType: "None", bool: "True or False", int: "an integer", float: "a number", str: "a string"}
    return known.get(hint) or str(getattr(origin or hint, "__name__", hint))
