"""Which parts of a sample are numbers of their own, and which of them loggers get."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from re import fullmatch
from typing import Literal, get_args

import numpy as np

from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Detail
from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.reports.dashboard import Sample
from lightning_lowrank.reports.loggers import Array, summaries

# Most scalars of single sites that `per_site="auto"` writes: what a dashboard still shows at once.
FEW = 100

DETAILS = get_args(Detail)

Host = Mapping[str, Array]
Values = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Style:
    """Which numbers of a monitor its loggers get; the tab and reports have everything.

    Attributes:
        label: Word for the monitor in messages, the group of its tags, and its cost tags.
        prefix: Of the names of its quantities; left out of the group, whose name has it.
        detail: "core": medians over sites, and numbers of the whole model, of the quantities that the monitor is for.
            "standard": minimum, median and maximum of most quantities; single sites where they are few. "all": also
            errors, chance levels and all other quantities.
        per_site: Scalars of single sites: always, never, or "auto": from "standard" on, where there are at most 100.
        histograms: Also the spectra.
        by_site: Quantities of which single sites are written; known once there are sites.

    Raises:
        ValueError: An option is another word.
    """

    label: str
    prefix: str = ""
    detail: Detail = "core"
    per_site: bool | Literal["auto"] = "auto"
    histograms: bool = False
    by_site: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not fullmatch(r"[A-Za-z0-9_.-]+", self.label):
            raise ValueError(
                f"name={self.prefix[:-1]!r}: the name begins all tags and may contain only letters, digits and _.-"
            )
        if self.detail not in DETAILS:
            raise ValueError(f"detail={self.detail!r} must be one of {list(DETAILS)}")
        if not (isinstance(self.per_site, bool) or self.per_site == "auto"):
            raise ValueError(f"per_site={self.per_site!r} must be True, False or 'auto'")

    def shows(self, detail: Detail) -> bool:
        """Whether loggers get what needs so much detail."""
        return DETAILS.index(detail) <= DETAILS.index(self.detail)

    def tag(self, quantity: str, end: str = "") -> str:
        """Group and name of a number: `curvature/hessian_lambda_max`, `rank/gradient_stable_rank_median`."""
        word = self.label.removeprefix(self.prefix)
        name = quantity.removeprefix(self.prefix).removeprefix(f"{word}_")
        return f"{self.label}/{name}_{end}" if end else f"{self.label}/{name}"


@dataclass(frozen=True)
class Report:
    """The numbers of one sample, moved to the host.

    Attributes:
        step: On the x-axis.
        values: Quantity -> site -> number, of single sites and of the whole model.
        summaries: Minimum, median and maximum over sites, or the number of the whole model, by tag.
        shown: Those of them that loggers get.
        sites: Numbers of single sites that loggers get, by tag.
    """

    step: int
    values: Values
    summaries: Mapping[str, float]
    shown: Mapping[str, float]
    sites: Mapping[str, float]


def report_of(
    step: int, recorders: Sequence[Recorder], host: Host, awaited: Mapping[str, set[str]], style: Style
) -> Report:
    """Everything that is made of a sample, in one walk over its quantities.

    Args:
        step: On the x-axis.
        recorders: Those that the sample is of.
        host: Rows of numbers, by quantity.
        awaited: By recorder, the sites that must have a number.
        style: What of it is shown.
    """
    values: dict[str, Mapping[str, float]] = {}
    every: dict[str, float] = {}
    shown: dict[str, float] = {}
    sites: dict[str, float] = {}
    for recorder in recorders:
        for quantity in (q for q in host if q in recorder.measured):
            row = values[quantity] = _by_site(recorder, quantity, host[quantity], awaited[recorder.name])
            found = _summary(style, recorder, quantity, row)
            every |= found
            ends = len(found) == 1 or style.shows("standard")
            if style.shows(_detail(recorder, quantity)):
                shown |= found if ends else {tag: x for tag, x in found.items() if tag.endswith("_median")}
            known = quantity.removesuffix("_error") if style.shows("all") else quantity
            if known in style.by_site:
                sites |= {f"{quantity}/{site}": value for site, value in row.items()}
    return Report(step, values, every, shown, sites)


def _summary(style: Style, recorder: Recorder, quantity: str, row: Mapping[str, float]) -> dict[str, float]:
    """A number of the whole model, or minimum, median and maximum over sites, by tag."""
    if recorder.is_global(quantity):
        return {style.tag(quantity): next(iter(row.values()), math.nan)}
    ends = summaries(np.array(list(row.values())))
    return {style.tag(quantity, end): value for end, value in ends.items()}


def quantities_by_site(style: Style, recorders: Sequence[Recorder]) -> frozenset[str]:
    """Quantities whose single sites are written: those that are shown, those of the core, or none: few.

    Decided once, of all that is watched: curves of probes with schedules of their own would have gaps.
    """
    if style.per_site is False or (style.per_site == "auto" and not style.shows("standard")):
        return frozenset()
    named = [(r, q) for r in recorders for q in r.quantities if not r.is_global(q)]
    if style.per_site is True:
        return frozenset(q for _, q in named)
    for allowed in DETAILS[DETAILS.index(style.detail) :: -1]:
        asked = [(r, q) for r, q in named if DETAILS.index(_detail(r, q)) <= DETAILS.index(allowed)]
        if sum(len(r.sites_of(q)) for r, q in asked) <= FEW:
            return frozenset(q for _, q in asked)
    return frozenset()


def charts(style: Style, recorder: Recorder) -> dict[str, list[str]]:
    """Tags of each quantity over sites that is drawn: median, minimum and maximum."""
    drawn = [q for q in recorder.quantities if not recorder.is_global(q) and style.shows(recorder.detail(q))]
    return {quantity: [style.tag(quantity, end) for end in ("median", "min", "max")] for quantity in drawn}


def _by_site(recorder: Recorder, quantity: str, row: Array, awaited: set[str]) -> dict[str, float]:
    """Numbers by site: of the whole model, or of each of its sites."""
    there = awaited & ({WHOLE_MODEL} if recorder.is_global(quantity) else awaited - {WHOLE_MODEL})
    return {site: float(value) for site, value in zip(recorder.sites, row, strict=True) if site in there}


def _detail(recorder: Recorder, quantity: str) -> Detail:
    """Least detail at which loggers get it; errors and chance levels never double the count."""
    stands_beside = quantity.endswith(("_error", "_chance", "_floor")) and not quantity.endswith("_over_floor")
    return "all" if stands_beside else recorder.detail(quantity)


def merged(report: Report, old: Sample | None, *, keep: bool) -> Sample:
    """A sample with what a report adds: probes have schedules of their own, and validation reports by itself.

    Args:
        keep: What was there first stays; otherwise the new replaces it.
    """
    if old is None:
        return Sample(report.step, report.values)
    both = (report.values, old.values) if keep else (old.values, report.values)
    merged = {q: {**both[0].get(q, {}), **both[1].get(q, {})} for q in {**old.values, **report.values}}
    return Sample(old.step if keep else report.step, merged)
