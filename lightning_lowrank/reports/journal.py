"""What a monitor writes: its numbers to all loggers, each kind of failure to the console once."""

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.clock import Clock
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Detail
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.schedules import WARM_UP, Budget, Every
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports import dashboard, loggers
from lightning_lowrank.reports.alerts.rulebook import Rulebook
from lightning_lowrank.reports.dashboard import Sample
from lightning_lowrank.reports.loggers import Array
from lightning_lowrank.reports.vectors import Vectors, rows

# Most scalars of single sites that `per_site="auto"` writes: what a dashboard still shows at once.
FEW = 100

DETAILS = get_args(Detail)
# Of our own cost and failures, what every logger gets.
CORE_COSTS = ("overhead_percent", "failures")

Host = Mapping[str, Array]
Values = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Style:
    """What of a monitor's numbers its loggers get; the tab and reports have everything.

    Attributes:
        label: Word for the monitor in messages, the group of its tags, and its cost tags.
        prefix: Of the names of its quantities; left out of the group, whose name has it.
        detail: "core": medians over sites, and numbers of the whole model, of the quantities that the monitor is for.
            "standard": minimum, median and maximum of most quantities; single sites where they are few. "all": also
            errors, chance levels and all other quantities.
        per_site: Scalars of single sites: always, never, or "auto": from "standard" on, where there are at most 100.
        histograms: Also the spectra.

    Raises:
        ValueError: An option is another word.
    """

    label: str
    prefix: str = ""
    detail: Detail = "core"
    per_site: bool | Literal["auto"] = "auto"
    histograms: bool = False

    def __post_init__(self) -> None:
        if self.detail not in DETAILS:
            raise ValueError(f"detail={self.detail!r}: one of {list(DETAILS)}")
        if not (isinstance(self.per_site, bool) or self.per_site == "auto"):
            raise ValueError(f"per_site={self.per_site!r}: it is True, False or 'auto'")

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


class Journal:
    """Keeps what was measured and what went wrong, and writes it to the loggers.

    Args:
        style: What loggers get.
        alerts: The rules that reports are shown to.
        budget: What the monitor keeps to.
    """

    def __init__(self, style: Style, *, alerts: Rulebook, budget: Budget | None = None) -> None:
        self.style, self.alerts, self.budget = style, alerts, budget
        self.label = style.label
        self.first: Sample | None = None
        self.latest: Sample | None = None
        self.failures = 0
        self.skipped = 0
        self.clock = Clock()
        self._vectors = Vectors()
        self._said: set[str] = set()
        self._laid_out = False
        # Quantities of which single sites are written; decided when sites are known.
        self._of_sites: frozenset[str] = frozenset()
        # Sites that a sample has given a number, while it waits for another optimizer, by recorder.
        self.given: dict[str, set[str]] = {}

    def write(self, training: Training, recorders: Sequence[Recorder], host: Host, *, complete: bool) -> None:
        """Keep a report and hand it to all loggers.

        Args:
            training: Whose loggers they are.
            recorders: Those that the report is of.
            host: The report, moved to the host.
            complete: No optimizer is still to be read: a site that no report of this sample had is lost.
        """
        awaited = {r.name: self._awaited(r, host[f"{r.name}_lost"], complete) for r in recorders}
        report = self._report(training.step, recorders, host, awaited)
        # First, since all processes must decide alike: what comes after may fail in one of them.
        self.alerts.observe(report.step, report.values)
        self._count_losses(recorders, host, awaited)
        self.first = _merged(report, self.first, keep=True)
        self.latest = _merged(report, self.latest, keep=False)
        self._note(recorders)
        training.mirror(report.summaries)
        costs, levels = self._costs(recorders), self.alerts.levels()
        scalars = {**report.shown, **report.sites, **self._own(recorders, costs, levels)}
        draws = [
            self._vectors.draw(rows(self.label, recorders, report.values, host, costs, levels), report.step),
            loggers.draw_counts(dict(_counts(recorders, host)), report.step),
            *self._pictures(host, report.step),
        ]
        self.count_errors(loggers.write(training.loggers, scalars, report.step, draws))

    def announce(self, recorders: Sequence[Recorder]) -> None:
        """Say once what will be measured, and what memory it keeps."""
        self._of_sites = self._quantities_by_site(recorders)
        self._layout = dashboard.layout(
            {r.name: self._charts(r) for r in recorders}, margins=self.style.shows("standard")
        )
        counts = ", ".join(f"{r.name} at {_places(r.expected)} ({_when(r.probe)})" for r in recorders)
        facts = {r.name: r.probe.source.facts() for r in recorders}
        kept = [f"{name} keeps {known['bytes']:,.0f} bytes" for name, known in facts.items() if "bytes" in known]
        self.info_once("; ".join([counts, *kept]))
        self._note(recorders)

    def act(self, training: Training) -> None:
        """Do what alerts ask for, save raising."""
        for trouble in self.alerts.act(training):
            self.warn_once(trouble)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and words, which load with `weights_only=True`."""
        budget = {} if self.budget is None else self.budget.state_dict()
        counts = {"failures": self.failures, "skipped": self.skipped}
        return counts | {"alerts": self.alerts.state_dict(), "budget": budget}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run was stopped."""
        self.failures, self.skipped = state["failures"], state["skipped"]
        self.alerts.load_state_dict(state["alerts"])
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])

    def begin(self) -> None:
        """Another run, that is no continuation."""
        self.first = self.latest = None
        self.failures = self.skipped = 0
        self.alerts.begin()
        if self.budget is not None:
            self.budget.forget()

    def start(self, *, on_device: bool) -> None:
        """Training begins, or goes on: from here the cost counts."""
        self.clock.start(on_device=on_device)
        if self.budget is not None:
            self.budget.begin()

    def step_begins(self, step: int, team: Team) -> None:
        """Hold the cost so far against the budget, and say what that has chosen."""
        budget = self.budget
        if budget is not None and budget.observe(step, self.clock.own, self.clock.total, team):
            times = f"a sample takes {1000 * budget.sample:.3g} ms, a step {1000 * budget.step:.3g} ms"
            self.info_once(
                f"every {budget.every} steps from now on: {times}, {_percent(budget)} of the time may be spent"
            )

    def end(self) -> None:
        """The run is over; another has a clock and a dashboard of its own."""
        self.clock.pause()
        self._laid_out = False
        for trouble in self.alerts.calls.wait():
            self.warn_once(trouble)

    def forget(self) -> None:
        """The sample in the making is given up."""
        self.given.clear()

    def warn_once(self, message: str, count: int = 1, *, everywhere: bool = False) -> None:
        """Count what went wrong, and say each kind of it once.

        Args:
            everywhere: Also where it is not the first process that knows of it.
        """
        self.failures += count
        kind = message.partition(":")[0]
        self._warn(
            kind, f"{message}. Training goes on; counted in lowrank/{self.label}_failures.", everywhere=everywhere
        )

    def _warn(self, kind: str, message: str, *, everywhere: bool = False) -> None:
        if kind in self._said:
            return
        self._said.add(kind)
        process = getattr(rank_zero_only, "rank", 0)
        if process == 0:
            rank_zero_warn(f"lightning_lowrank {self.label}: {message}")
        elif everywhere:
            warnings.warn(f"lightning_lowrank {self.label}, process {process}: {message}", stacklevel=4)

    def count_errors(self, errors: Sequence[Exception]) -> None:
        """Count what loggers raised."""
        for error in errors:
            self.warn_once(f"a logger raised {type(error).__name__}: {error}")

    def info_once(self, message: str) -> None:
        """Say something once."""
        if message not in self._said:
            self._said.add(message)
            rank_zero_info(f"lightning_lowrank {self.label}: {message}")

    def _note(self, recorders: Sequence[Recorder]) -> None:
        """Say how sources read, and again when that has changed."""
        for recorder in recorders:
            try:
                note = recorder.probe.source.note()
            except Exception as error:  # before training, and a source of the user's
                self.warn_once(f"{recorder.name}: {type(error).__name__}: {error}")
            else:
                if note:
                    self.info_once(f"{recorder.name} is {note}")

    def _awaited(self, recorder: Recorder, flags: Array, complete: bool) -> set[str]:
        """Sites that must have a number in this report: those just read; at the end of a sample also those that no
        earlier report covered.
        """
        read = {site for site, flag in zip(recorder.sites, flags, strict=True) if not np.isnan(flag)}
        recorder.expected |= dict.fromkeys(sorted(read))
        given = self.given.pop(recorder.name, set()) | read
        if complete:
            return read | (recorder.expected.keys() - given)
        self.given[recorder.name] = given
        return read

    def _count_losses(self, recorders: Sequence[Recorder], host: Host, awaited: Mapping[str, set[str]]) -> None:
        """Count sites that gave no number: not finite, not decomposed, or not there."""
        for recorder in recorders:
            flags = zip(recorder.sites, host[f"{recorder.name}_lost"], strict=True)
            lost = [site for site, flag in flags if flag != 0 and site in awaited[recorder.name]]
            error = recorder.take_error()
            if lost or error:
                where = (
                    f"{len(lost)} of {len(recorder.expected)} sites, the first is {_named(lost[0])}"
                    if lost
                    else "a part of it"
                )
                self.warn_once(
                    f"{recorder.name}: no number for {where}{f' ({error})' if error else ''}",
                    max(1, len(lost)),
                    everywhere=bool(error),
                )
            elif not recorder.expected:
                self.info_once(f"there is no {recorder.name} to read")

    def _report(self, step: int, recorders: Sequence[Recorder], host: Host, awaited: Mapping[str, set[str]]) -> Report:
        """Everything that is made of a sample, in one walk over its quantities."""
        values: dict[str, Mapping[str, float]] = {}
        summaries: dict[str, float] = {}
        shown: dict[str, float] = {}
        sites: dict[str, float] = {}
        for recorder in recorders:
            for quantity in (q for q in host if q in recorder.measured):
                row = values[quantity] = _by_site(recorder, quantity, host[quantity], awaited[recorder.name])
                found = self._summary(recorder, quantity, row)
                summaries |= found
                ends = len(found) == 1 or self.style.shows("standard")
                if self.style.shows(_detail(recorder, quantity)):
                    shown |= found if ends else {tag: x for tag, x in found.items() if tag.endswith("_median")}
                known = quantity.removesuffix("_error") if self.style.shows("all") else quantity
                if known in self._of_sites:
                    sites |= {f"{quantity}/{site}": value for site, value in row.items()}
        return Report(step, values, summaries, shown, sites)

    def _summary(self, recorder: Recorder, quantity: str, row: Mapping[str, float]) -> dict[str, float]:
        """A number of the whole model, or minimum, median and maximum over sites, by tag."""
        if recorder.is_global(quantity):
            return {self.style.tag(quantity): next(iter(row.values()), math.nan)}
        ends = loggers.summaries(np.array(list(row.values())))
        return {self.style.tag(quantity, end): value for end, value in ends.items()}

    def _quantities_by_site(self, recorders: Sequence[Recorder]) -> frozenset[str]:
        """Quantities whose single sites are written: all, those of the core, or none, so that they are few.

        Decided once, of all that is watched: curves of probes with schedules of their own would have gaps.
        """
        if self.style.per_site is False or (self.style.per_site == "auto" and not self.style.shows("standard")):
            return frozenset()
        named = [(r, q) for r in recorders for q in r.quantities if not r.is_global(q)]
        for allowed in DETAILS[::-1]:
            asked = [(r, q) for r, q in named if DETAILS.index(r.detail(q)) <= DETAILS.index(allowed)]
            if self.style.per_site is True or sum(len(r.sites_of(q)) for r, q in asked) <= FEW:
                return frozenset(q for _, q in asked)
        return frozenset()

    def _charts(self, recorder: Recorder) -> dict[str, list[str]]:
        """Tags of each quantity over sites that is drawn: median, minimum and maximum."""
        drawn = [q for q in recorder.quantities if not recorder.is_global(q) and self.style.shows(recorder.detail(q))]
        return {quantity: [self.style.tag(quantity, end) for end in ("median", "min", "max")] for quantity in drawn}

    def _pictures(self, host: Host, step: int) -> Iterator[Any]:
        """Histograms where they are asked for; once a run the layout of TensorBoard's custom scalars."""
        if self.style.histograms:
            yield loggers.draw_histograms({tag: row for tag, row in host.items() if "_spectrum/" in tag}, step)
        if not self._laid_out:
            self._laid_out = True
            yield lambda writer: dashboard.write_layout(writer, self._layout)

    def _own(
        self, recorders: Sequence[Recorder], costs: Mapping[str, float], levels: Mapping[str, float]
    ) -> dict[str, float]:
        """What is not of the model: cost and failures, what sources say of themselves, states of alerts."""
        more = self.style.shows("standard")
        facts = {f"lowrank/{r.name}_{key}": value for r in recorders for key, value in r.probe.source.facts().items()}
        shown = {name: value for name, value in costs.items() if more or name in CORE_COSTS}
        return {
            **(facts if more else {}),
            **{f"lowrank/{self.label}_{name}": value for name, value in shown.items()},
            **{f"lowrank/alert/{rule}": level for rule, level in levels.items()},
        }

    def _costs(self, recorders: Sequence[Recorder]) -> dict[str, float]:
        """Our own cost and failure counts, by name."""
        numbers = {
            "time_ms": 1000 * self.clock.take_sample(),
            "overhead_percent": self.clock.percent,
            "failures": float(self.failures),
            "skipped_steps": float(self.skipped),
            "solver_calls": float(sum(r.take_solves() for r in recorders)),
        }
        return numbers | self._of_budget()

    def _of_budget(self) -> dict[str, float]:
        """The cadence that was chosen and what it costs; a word if that is too much."""
        budget = self.budget
        if budget is None or budget.every is None:
            return {}
        if budget.exceeded:
            spent = f"it took {budget.overhead:.2g} % of the time since the warm-up, {_percent(budget)} were allowed"
            self._warn(
                "budget", f"{spent}. The cadence stays at every {budget.every} steps, so that curves stay comparable."
            )
        known = {} if math.isnan(budget.overhead) else {"overhead_percent_after_warm_up": budget.overhead}
        return known | {"every_n_steps": float(budget.every)}


def _by_site(recorder: Recorder, quantity: str, row: Array, awaited: set[str]) -> dict[str, float]:
    """Numbers by site: of the whole model, or of each of its sites."""
    there = awaited & ({WHOLE_MODEL} if recorder.is_global(quantity) else awaited - {WHOLE_MODEL})
    return {site: float(value) for site, value in zip(recorder.sites, row, strict=True) if site in there}


def _counts(recorders: Sequence[Recorder], host: Host) -> Iterator[tuple[str, Sequence[Array]]]:
    """What recorders count in cells, by the tag of its histogram: the middles of the cells, and how much is in each."""
    for recorder in recorders:
        for curve in (curve for curve in recorder.curves if curve.middles and curve.name in host):
            for site, middles, inside in zip(recorder.sites, host[curve.middles].T, host[curve.name].T, strict=True):
                if np.isfinite(inside).all():
                    yield "/".join(filter(None, (curve.name, site))), (middles, inside)


def _detail(recorder: Recorder, quantity: str) -> Detail:
    """Least detail at which loggers get it; errors and chance levels never double the count."""
    return "all" if quantity.endswith(("_error", "_chance")) else recorder.detail(quantity)


def _merged(report: Report, old: Sample | None, *, keep: bool) -> Sample:
    """A sample with what a report adds: probes have schedules of their own, and validation reports by itself.

    Args:
        keep: What was there first stays; otherwise the new replaces it.
    """
    if old is None:
        return Sample(report.step, report.values)
    both = (report.values, old.values) if keep else (old.values, report.values)
    merged = {q: {**both[0].get(q, {}), **both[1].get(q, {})} for q in {**old.values, **report.values}}
    return Sample(old.step if keep else report.step, merged)


def _when(probe: Probe) -> str:
    if probe.source.stage == "validation":
        return "every validation"
    match probe.schedule:
        case Every(n=steps) | Budget(every=int(steps)):
            return f"every {steps} steps"
        case Budget() as budget:
            return f"for at most {_percent(budget)} of the time, measured in the first {WARM_UP} steps"
    return "as scheduled"


def _places(sites: Collection[str]) -> str:
    """What a monitor has numbers of; the whole model is no site among others."""
    parts, whole = sum(site != WHOLE_MODEL for site in sites), [_named(WHOLE_MODEL)] if WHOLE_MODEL in sites else []
    return " and ".join([*([f"{parts} sites"] if parts else []), *whole]) or "its sites"


def _named(site: str) -> str:
    return "the whole model" if site == WHOLE_MODEL else repr(site)


def _percent(budget: Budget) -> str:
    return f"{100 * budget.share:g} %"
