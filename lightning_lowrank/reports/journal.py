"""What a monitor tells: its numbers to all loggers, each kind of trouble once."""

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from numpy.typing import NDArray

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.clock import Clock
from lightning_lowrank.measuring.number_source import WHOLE_MODEL
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.schedules import WARM_UP, Budget, Every
from lightning_lowrank.reports import dashboard
from lightning_lowrank.reports import loggers as sinks
from lightning_lowrank.reports.alerts.rulebook import Rulebook
from lightning_lowrank.reports.dashboard import Sample
from lightning_lowrank.reports.vectors import Vectors, rows

# Most scalars of single sites that `per_site="auto"` writes: what a dashboard still shows at once.
FEW = 100

Host = Mapping[str, NDArray[np.float64]]


class Journal:
    """Keeps what was measured and what went wrong, and writes it to the loggers.

    Args:
        label: Word for the monitor in messages and cost tags.
        per_site: Scalars of single sites.
        histograms: Also the spectra.
        alerts: The rules that reports are shown to.
        budget: What the monitor keeps to.
    """

    def __init__(
        self,
        label: str,
        *,
        per_site: bool | Literal["auto"],
        histograms: bool,
        alerts: Rulebook,
        budget: Budget | None = None,
    ) -> None:
        self.label, self.per_site, self.histograms, self.alerts, self.budget = (
            label,
            per_site,
            histograms,
            alerts,
            budget,
        )
        self.first: Sample | None = None
        self.latest: Sample | None = None
        self.failures = 0
        self.skipped = 0
        self.clock = Clock()
        self._vectors = Vectors()
        self._said: set[str] = set()
        self._laid_out = False
        self._watched: Sequence[Recorder] = ()
        # Sites that a sample has given a number, while it waits for another optimizer, by recorder.
        self.given: dict[str, set[str]] = {}

    def write(self, trainer: L.Trainer, recorders: Sequence[Recorder], host: Host, *, complete: bool) -> None:
        """Keep a report and hand it to all loggers.

        Args:
            recorders: Those that the report is of.
            host: The report, moved to the host.
            complete: No optimizer is still to be read: a site that no report of this sample had is lost.
        """
        awaited = {r.name: self._awaited(r, host[f"{r.name}_lost"], complete) for r in recorders}
        values = {q: _by_site(r, q, host[q], awaited[r.name]) for r in recorders for q in host if q in r.measured}
        step = sinks.step_of(trainer)
        # First, since all processes must decide alike: what comes after may fail in one of them.
        self.alerts.observe(step, values)
        self._count_losses(recorders, host, awaited)
        self.first, self.latest = (
            _merged(step, values, self.first, keep=True),
            _merged(step, values, self.latest, keep=False),
        )
        of_sites = {q: row for r in recorders for q, row in values.items() if q in r.measured and not r.is_global(q)}
        of_model = {
            quantity: next(iter(row.values()), math.nan) for quantity, row in values.items() if quantity not in of_sites
        }
        summaries = of_model | {
            f"lowrank/{quantity}_{end}": value
            for quantity, row in of_sites.items()
            for end, value in sinks.summaries(np.array(list(row.values()))).items()
        }
        self._remark(recorders)
        facts = {f"lowrank/{r.name}_{key}": value for r in recorders for key, value in r.probe.source.facts().items()}
        sinks.mirror(trainer, summaries)
        scalars = summaries | self._sites(of_sites) | facts | self._costs(recorders) | self.alerts.scalars()
        self.count_errors(sinks.write(sinks.loggers_of(trainer), scalars, step))
        self.count_errors(
            self._vectors.write(sinks.loggers_of(trainer), rows(self.label, recorders, values, host, scalars), step)
        )
        self.count_errors(sinks.write_counts(sinks.loggers_of(trainer), dict(_counts(recorders, host)), step))
        if self.histograms:
            self.count_errors(
                sinks.write_histograms(
                    sinks.loggers_of(trainer), {tag: row for tag, row in host.items() if "_spectrum/" in tag}, step
                )
            )

    def announce(self, recorders: Sequence[Recorder]) -> None:
        """Say once what will be measured, and what memory it keeps."""
        self._watched = recorders
        counts = ", ".join(f"{r.name} at {_places(r.expected)} ({_when(r.probe)})" for r in recorders)
        facts = {r.name: r.probe.source.facts() for r in recorders}
        kept = [f"{name} keeps {known['bytes']:,.0f} bytes" for name, known in facts.items() if "bytes" in known]
        self.info_once("; ".join([counts, *kept]))
        self._remark(recorders)

    def act(self, trainer: L.Trainer) -> None:
        """Do what alerts ask for, save raising."""
        for trouble in self.alerts.act(trainer):
            self.warn_once(trouble)

    def lay_out(self, trainer: L.Trainer, quantities: Mapping[str, Sequence[str]]) -> None:
        """TensorBoard's custom-scalars page, once."""
        if not self._laid_out:
            self._laid_out = True
            layout = dashboard.layout(quantities)
            self.count_errors(
                sinks.each_writer(
                    sinks.loggers_of(trainer),
                    "add_custom_scalars",
                    lambda writer: dashboard.write_layout(writer, layout),
                )
            )

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

    def _remark(self, recorders: Sequence[Recorder]) -> None:
        """Say how sources read, and again when that has changed."""
        for recorder in recorders:
            if remark := recorder.probe.source.note():
                self.info_once(f"{recorder.name} is {remark}")

    def _awaited(self, recorder: Recorder, flags: NDArray[np.float64], complete: bool) -> set[str]:
        """Sites that this report owes a number: those read now, and at the end of a sample those that no report of it
        has had.
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

    def _sites(self, values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Scalars of single sites, if they are few or asked for; where they are many, without details, if these are
        few.

        Few of all that are watched, not of this report: curves of probes with schedules of their own would have gaps.
        """
        details = {quantity for r in self._watched for quantity in r.measured if r.is_detail(quantity)}
        for without in (set[str](), details):
            asked = [(r, q) for r in self._watched for q in r.quantities if not r.is_global(q) and q not in without]
            few = sum(len(r.sites_of(q)) for r, q in asked) <= FEW
            if self.per_site is True or (self.per_site == "auto" and few):
                return {
                    f"{q}/{site}": value for q, row in values.items() if q not in without for site, value in row.items()
                }
        return {}

    def _costs(self, recorders: Sequence[Recorder]) -> dict[str, float]:
        """Our own cost and failure counts."""
        numbers = {
            "time_ms": 1000 * self.clock.take_sample(),
            "overhead_percent": self.clock.percent,
            "failures": float(self.failures),
            "skipped_steps": float(self.skipped),
            "solver_calls": float(sum(r.take_solves() for r in recorders)),
        }
        return {f"lowrank/{self.label}_{key}": value for key, value in (numbers | self._of_budget()).items()}

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


def _by_site(recorder: Recorder, quantity: str, row: NDArray[np.float64], awaited: set[str]) -> dict[str, float]:
    """Numbers by site: of the whole model, or of each of its sites."""
    there = awaited & ({WHOLE_MODEL} if recorder.is_global(quantity) else awaited - {WHOLE_MODEL})
    return {site: float(value) for site, value in zip(recorder.sites, row, strict=True) if site in there}


def _counts(recorders: Sequence[Recorder], host: Host) -> Iterator[tuple[str, Sequence[NDArray[np.float64]]]]:
    """What recorders count in cells, by the tag of its histogram: the middles of the cells, and how much is in each."""
    for recorder in recorders:
        for curve in (curve for curve in recorder.curves if curve.middles and curve.name in host):
            for site, middles, inside in zip(recorder.sites, host[curve.middles].T, host[curve.name].T, strict=True):
                if np.isfinite(inside).all():
                    yield "/".join(filter(None, (curve.name, site))), (middles, inside)


def _merged(step: int, values: Mapping[str, Mapping[str, float]], old: Sample | None, *, keep: bool) -> Sample:
    """A sample with what a report adds: probes have schedules of their own, and validation reports by itself.

    Args:
        keep: What was there first stays; otherwise the new replaces it.
    """
    if old is None:
        return Sample(step, values)
    both = (values, old.values) if keep else (old.values, values)
    return Sample(
        old.step if keep else step, {q: {**both[0].get(q, {}), **both[1].get(q, {})} for q in {**old.values, **values}}
    )


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
