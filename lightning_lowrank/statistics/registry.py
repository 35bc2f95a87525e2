"""Registration of statistics: one decorator makes a formula known to probes, metrics and tests by its name."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache, partial, wraps
from inspect import Parameter, cleandoc, get_annotations, signature
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.maths.spectra.marchenko_pastur import null
from lightning_lowrank.maths.spectra.spectrum import Needs, Spectrum, pooled, ratio

Formula = Callable[..., Tensor]

REGISTERED: dict[str, "Statistic"] = {}


@dataclass(frozen=True)
class Statistic:
    """A formula with its properties.

    Attributes:
        name: Name of its function, with the parameter and `relative_` if requested: `relative_energy_rank_0.01`.
        function: Value object(s) -> Tensor `[*B]`.
        takes: The types of its value objects: one, or two for a statistic of a pair.
        unit: Its unit: "directions", "1", "entries" (the unit of the matrix's entries).
        needs: The least that a spectrum must contain: "moments" (energy and its square), "top" (also the largest
            value), "values".
        tail: Whether it reads the smallest values: NaN on spectra that are not whole. May be registered as a function
            of the parameter.
        scale_free: Whether it does not change when the matrix is multiplied by a number; otherwise it is multiplied by
            the same number.
        partner: The second value object of a pair: "weight" (same site) or "previous" (same site, last sample).
        parameter: Name of the number that may end the name; None without one.
        domain: Lower (excluded) and upper (included) bound of that number.
        counts: Whether it is a whole number, or in its relative form a multiple of one part.
        reads_shape: Whether it depends on the shape of the matrix, not only on its singular values; every relative form
            does.
        comparable: Whether it has a relative form, divided by the value for a Gaussian matrix of the same shape and
            energy.
        misleads: When it misleads, as a sentence.
    """

    name: str
    function: Callable[..., Tensor]
    takes: tuple[type, ...]
    unit: str
    needs: Needs = "values"
    tail: bool = False
    scale_free: bool = True
    partner: Literal["weight", "previous"] | None = None
    parameter: str | None = None
    domain: tuple[float, float] = (0.0, float("inf"))
    counts: bool = False
    reads_shape: bool = False
    comparable: bool = True
    misleads: str = ""

    @property
    def says(self) -> str:
        """Its definition, its bounds, and when it misleads."""
        function = self.function
        while isinstance(function, partial):
            function = function.args[0].function if function.func is _over_null else function.func
        first, returns = _paragraphs(function.__doc__ or "")
        if self.name.startswith("relative_"):
            return (
                f"{first.rstrip('.')}; here divided by the value for a Gaussian matrix of the same shape, so "
                "that 1 is noise."
            )
        return " ".join(filter(None, (first, returns, self.misleads))).replace("`", "")

    def __call__(self, *values: Any) -> Tensor:
        """The statistic of one value object, or of a pair."""
        return self.function(*values)

    def step(self, shape: tuple[int, int]) -> float:
        """Distance between its values on matrices of that shape; 0 if it varies continuously."""
        if not self.counts:
            return 0.0
        return 1 / _expected(self.name.removeprefix("relative_"), shape) if self.name.startswith("relative_") else 1.0

    def null(self, shape: tuple[int, int]) -> float:
        """What a Gaussian matrix of that shape gives, 1 for relative forms; NaN where that does not compare, or depends
        on the size of the entries.
        """
        if self.name.startswith("relative_"):
            return 1.0
        return _expected(self.name, shape) if self.comparable and self.scale_free and not self.partner else math.nan


@lru_cache
def _paragraphs(text: str) -> tuple[str, str]:
    """The first paragraph, and the paragraph of `Returns`, each on one line."""
    first, _, rest = cleandoc(text).partition("\n\n")
    returns = re.search(r"^Returns:\n((?:    .*\n?)+)", rest, re.MULTILINE)
    return " ".join(first.split()), " ".join(returns[1].split()) if returns else ""


def statistic(*, tail: bool | Callable[[float], bool] = False, **known: Any) -> Callable[[Formula], Formula]:
    """Register a function under its own name; `known` are fields of `Statistic`.

    The returned function can be called in the same way. In addition it pools the probes of an estimate. It returns NaN
    if the matrix was not finite, or if `tail` is needed from a spectrum that is not whole.
    """

    def register(function: Formula) -> Formula:
        name = function.__name__
        if name in REGISTERED and REGISTERED[name].function.__module__ != function.__module__:
            raise ValueError(f"there is a statistic {name!r} already, in {REGISTERED[name].function.__module__}")
        takes = tuple(
            a for k, a in get_annotations(function).items() if isinstance(a, type) and k != "return" and a is not float
        )
        defaults = (parameter.default for parameter in signature(function).parameters.values())
        default = next((value for value in defaults if value is not Parameter.empty), 0.0)
        reads_tail = tail if callable(tail) else lambda _: tail

        @wraps(function)
        def guarded(*values: Any, **parameters: float) -> Tensor:
            _refuse_others(name, takes, values)
            if isinstance(values[0], Scaling):  # It knows itself where there is none of it, and `valid` is 0 there.
                return function(*values, **parameters)
            values = tuple(map(pooled, values))
            if reads_tail(next(iter(parameters.values()), default)) and not all(value.whole for value in values):
                return torch.full_like(values[0].values[..., 0], torch.nan)
            return _with_losses(function(*values, **parameters), values)

        guarded.reads_tail = reads_tail  # type: ignore[attr-defined]
        REGISTERED[name] = Statistic(name, guarded, takes, tail=reads_tail(default), **known)
        return guarded

    return register


# How to make the value objects that statistics take, by the name of their class.
MADE_BY = {
    "Spectrum": "svd(matrix)",
    "Subspace": "top_subspace(matrix, k)",
    "Scaling": "multifractal_spectrum(matrix)",
}


def _refuse_others(name: str, takes: tuple[type, ...], values: tuple[Any, ...]) -> None:
    """Refuse what is no value object of the statistic, a bare matrix above all.

    Raises:
        ValueError: With how to make one.
    """
    if len(values) != len(takes) or not all(map(isinstance, values, takes)):
        wanted = ", ".join(MADE_BY.get(kind.__name__, kind.__name__) for kind in takes)
        given = ", ".join(type(value).__name__ for value in values)
        raise ValueError(
            f"{name} takes {', '.join(kind.__name__ for kind in takes)}, as in {name}({wanted}); not {given}"
        )


def _with_losses(result: Tensor, values: tuple[Any, ...]) -> Tensor:
    result = result.to(values[0].values.dtype)
    for value in values:
        result = torch.where(torch.isnan(value.values[..., 0]), torch.nan, result)
    return result


def find(name: str) -> Statistic:
    """The statistic of that name, with its parameter and its relative form.

    Raises:
        ValueError: There is none; the message lists what there is.

    Examples:
        >>> from lightning_lowrank import statistics
        >>> find("energy_rank_0.01").parameter
        'epsilon'
    """
    relative, plain = name.startswith("relative_"), name.removeprefix("relative_")
    match = re.fullmatch(r"(\w+?)_(\d+\.?\d*(?:e-?\d+)?)", plain)
    found = REGISTERED.get(plain) or (REGISTERED.get(match[1]) if match else None)
    if found is None or (relative and not found.comparable):
        raise ValueError(f"there is no statistic {name!r}{_nearest(name)}; available: {available()}")
    if plain != found.name:
        assert match is not None
        found = _with_parameter(found, name, float(match[2]))
    found = replace(found, name=plain)
    return _relative(found) if relative else found


def available() -> list[str]:
    """Names of all registered statistics; those with a parameter take it at the end, as in `energy_rank_0.01`."""
    return sorted(REGISTERED)


def _nearest(name: str) -> str:
    close = get_close_matches(name, REGISTERED, 1)
    return f", did you mean {close[0]!r}?" if close else ""


def _with_parameter(found: Statistic, name: str, value: float) -> Statistic:
    low, high = found.domain
    if found.parameter is None or not low < value <= high:
        takes = f"{found.parameter} above {low:g} and at most {high:g}" if found.parameter else "no parameter"
        raise ValueError(f"statistic {name!r}: {found.name} takes {takes}")
    tail = found.function.reads_tail(value)  # type: ignore[attr-defined]
    return replace(found, function=partial(found.function, **{found.parameter: value}), tail=tail)


def _relative(found: Statistic) -> Statistic:
    return replace(
        found,
        name=f"relative_{found.name}",
        function=partial(_over_null, found),
        unit="1",
        scale_free=True,
        reads_shape=True,
    )


def _over_null(found: Statistic, spectrum: Spectrum) -> Tensor:
    """A statistic over what a Gaussian matrix of that shape and energy gives; NaN where that is 0 or not defined."""
    spectrum = pooled(spectrum)
    result = found(spectrum) / _expected(found.name, spectrum.shape)
    return result if found.scale_free else ratio(result, spectrum.top * spectrum.unit_energies.sum(-1).sqrt())


@lru_cache(maxsize=65536)
def _expected(name: str, shape: tuple[int, int]) -> float:
    # Made on the CPU: numpy may look at it where it is, which is no wait for the device.
    return float(np.from_dlpack(find(name)(null(shape)))) or float("nan")
