"""Sources of finished numbers, which are not statistics of the spectrum of one matrix."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.source import Source

# The site of what belongs to the whole model.
WHOLE_MODEL = ""
# Directions that can be followed.
MOST_DIRECTIONS = 100

# How much loggers get; the tab and reports have everything at any detail.
Detail = Literal["core", "standard", "all"]


@dataclass(frozen=True)
class Quantity:
    """A number that a number source returns, for the whole model or for each site.

    Attributes:
        name: Its tag, without the monitor's prefix.
        unit: Its unit.
        per_site: Whether there is one for each site, and none for the whole model.
        estimated: Whether it comes with a standard error.
        detail: Smallest detail at which loggers get it: "core" for the purpose of the monitor, "all" for rarely needed
            numbers.
    """

    name: str
    unit: str = "1"
    per_site: bool = False
    estimated: bool = False
    detail: Detail = "standard"


def led_by(core: Collection[str], quantities: Iterable[Quantity], looked_up: Collection[str] = ()) -> list[Quantity]:
    """Quantities with the least detail at which loggers get them.

    Args:
        core: Names of those that the monitor is for.
        quantities: All that it gives.
        looked_up: Ends of the names of those that one looks up: what another moment or a null gives.
    """
    quantities = list(quantities)
    details: dict[str, Detail] = {q.name: "all" for q in quantities if q.name.endswith(tuple(looked_up))}
    details |= dict.fromkeys(core, "core")
    return [replace(quantity, detail=details.get(quantity.name, quantity.detail)) for quantity in quantities]


@dataclass(frozen=True)
class Curve:
    """A vector that a number source gives at each site, for the tab.

    Attributes:
        name: Its tag, without the monitor's prefix.
        axis: Where its numbers stand.
        middles: Of what counts what lies in cells: the name of the curve that has their middles. It is a histogram too.
    """

    name: str
    axis: tuple[float, ...]
    middles: str = ""


@dataclass(frozen=True)
class Numbers:
    """What a number source measured in one place.

    Attributes:
        site: Its label, or `WHOLE_MODEL`.
        values: Numbers by quantity; missing ones are NaN.
        errors: Standard errors of estimated quantities.
        curves: Vectors, as long as their axes.
    """

    site: str
    values: Mapping[str, Float[Tensor, ""]]
    errors: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    curves: Mapping[str, Float[Tensor, " _"]] = field(default_factory=dict)


def refuse_seed(seed: object) -> None:
    """Refuse a seed that is out of range.

    Raises:
        ValueError: It is none that every generator takes: with a step or the number of a process added, numpy's take 32
            bits.
    """
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**31 - 1")


def refuse_top_k(top_k: object) -> None:
    """Refuse a number of directions that is out of range.

    Raises:
        ValueError: There are none, or more than anyone reads: each has curves of its own.
    """
    if type(top_k) is not int or not 1 <= top_k <= MOST_DIRECTIONS:
        raise ValueError(f"top_k={top_k!r} must be a whole number from 1 to {MOST_DIRECTIONS}")


class NumberSource(Source):
    """A source of finished numbers.

    Attributes:
        quantities: Its quantities, fixed when it is created.
        trouble: Why a part of a sample is missing, until this is reported.
        curves: Vectors that it returns besides numbers, at every site.
        absent: Names of quantities that this model cannot have; nothing is written for them.
        shared: Whether each process returns the numbers of its share of the sites. Otherwise all return the same, and
            those of the first are used.
    """

    quantities: Sequence[Quantity]
    of_parameters = False
    trouble: Exception | None = None
    curves: Sequence[Curve] = ()
    absent: Collection[str] = ()
    shared = False

    @abstractmethod
    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of this sample, whose batches are over. Called on every process, so it may communicate."""

    def labels(self) -> Sequence[str]:
        """The whole model, unless a source has sites."""
        return [WHOLE_MODEL]
