"""Output of a monitor: numbers to all loggers, each kind of failure to the console once."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_lowrank.measuring.allowances import Allowance
from lightning_lowrank.measuring.clock import Clock
from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.schedules import Budget
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports import dashboard, loggers, unreadable
from lightning_lowrank.reports.alerts.rulebook import Rulebook
from lightning_lowrank.reports.announcing import (
    FirstSample,
    chosen,
    each,
    named,
    num_samples,
    of_all,
    percent,
    start_line,
    too_few,
    watched,
)
from lightning_lowrank.reports.dashboard import Sample
from lightning_lowrank.reports.loggers import Array
from lightning_lowrank.reports.report import Host, Style, charts, merged, quantities_by_site, report_of
from lightning_lowrank.reports.vectors import Vectors, rows

# Of our own cost and failures, what every logger gets.
CORE_COSTS = ("overhead_percent", "failures")


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
        self.no_number_since: int | None = None
        self.clock = Clock()
        self._vectors = Vectors()
        self._said: set[str] = set()
        self._laid_out = False
        self._first_sample = FirstSample([])
        self._total_steps: int | None = None
        # By recorder, what the last sample has not read, and what went wrong in it.
        self._unread: dict[str, set[str]] = {}
        self._errors: dict[str, str | None] = {}
        # Sites that a sample has given a number, while it waits for another optimizer, by recorder.
        self.given: dict[str, set[str]] = {}

    def write(
        self, training: Training, step: int, recorders: Sequence[Recorder], host: Host, *, complete: bool
    ) -> None:
        """Keep a report and hand it to all loggers.

        Args:
            training: Whose loggers they are.
            step: That it is of.
            recorders: Those that the report is of.
            host: The report, moved to the host.
            complete: No optimizer is still to be read: a site that no report of this sample had is lost.
        """
        awaited = {r.name: self._awaited(r, host[f"{r.name}_lost"], complete) for r in recorders}
        report = report_of(step, recorders, host, awaited, self.style)
        # First, since all processes must decide alike: what comes after may fail in one of them.
        self.alerts.observe(report.step, report.values)
        self._count_losses(training, report.step, recorders, host, awaited)
        self.first = merged(report, self.first, keep=True)
        self.latest = merged(report, self.latest, keep=False)
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

    def prepare(self, recorders: Sequence[Recorder], training: Training) -> None:
        """Settle what loggers get of the sites that were chosen, and hold the rules against them.

        Raises:
            ValueError: A rule looks at nothing, or asks for what nobody does.
        """
        self.alerts.check({quantity: r.sites_of(quantity) for r in recorders for quantity in r.quantities})
        self.alerts.check_actions(training)
        self.style = replace(self.style, by_site=quantities_by_site(self.style, recorders))
        self._layout = dashboard.layout(
            {r.name: charts(self.style, r) for r in recorders}, margins=self.style.shows("standard")
        )

    def announce(self, recorders: Sequence[Recorder], total_steps: int | None) -> None:
        """Say once what will be measured and what memory it keeps; warn where that will be no curve.

        Args:
            recorders: The probes at work.
            total_steps: Of the whole run, if that is known.
        """
        probes, self._total_steps = [recorder.probe for recorder in recorders], total_steps
        if self.budget is not None:
            self.budget.plan(total_steps)
            if self.budget.is_left_out:
                return
        facts = {r.name: r.probe.source.facts() for r in recorders}
        kept = [f"{name} keeps {known['bytes']:,.0f} bytes" for name, known in facts.items() if "bytes" in known]
        if isinstance(self.budget, Allowance):  # all who share it are told of together
            self.budget.watches = "; ".join([watched(self.label, recorders), *kept])
        else:
            self.info_once("; ".join([start_line(recorders, total_steps), *kept]))
        few = too_few(num_samples(probes, total_steps), total_steps)
        if few:
            self._warn("few samples", few)
        self._first_sample = FirstSample(probes)
        if not isinstance(self.budget, Allowance):  # those have a note with their first sample
            self._note(recorders)

    def refuse(self, error: Exception) -> bool:
        """Refuse what cannot be measured; `False`, and a word later, where nobody has asked for this monitor by name.

        Raises:
            ValueError: With the label.
        """
        if not isinstance(self.budget, Allowance):
            raise ValueError(f"{self.label}: {error}") from error
        self.budget.absent = re.split(r"[:;]|\. ", str(error))[0]  # not what to do about it
        return False

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
        """Continue a stopped run."""
        self.failures, self.skipped = state["failures"], state["skipped"]
        self.alerts.load_state_dict(state["alerts"])
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])

    def begin(self, training: Training) -> None:
        """Another run, that is no continuation."""
        unreadable.forget(training)
        self.first = self.latest = None
        self.failures = self.skipped = 0
        self.no_number_since = None
        self._unread, self._errors = {}, {}
        self.alerts.begin()
        if self.budget is not None:
            self.budget.forget()

    def start(self, training: Training, recorders: Sequence[Recorder]) -> None:
        """Training begins, or goes on: say what will be measured; from here the cost counts.

        Args:
            training: On whose device.
            recorders: The probes at work; none where nothing will be.
        """
        if self.budget is not None:
            self.budget.begin()
        if recorders:
            self.announce(recorders, training.total_steps)
        self.clock.start(on_device=training.device.type == "cuda")

    def step_begins(self, step: int, training: Training) -> None:
        """Hold the cost so far against the budget, and say what that has chosen."""
        self.clock.step_begins()
        if self._first_sample.waits:
            told = self._first_sample.step_begins(step, self.clock, self._total_steps)
            if told:
                self.info_once(told)
        budget = self.budget
        if budget is not None and budget.observe(step, self.clock.own, self.clock.total, training.team):
            if isinstance(budget, Allowance):
                for line in of_all(budget.purse):
                    rank_zero_info(f"lightning_lowrank watch_all: {line}")
            else:
                self.info_once(chosen(budget, self._total_steps))

    def end(self) -> None:
        """The run is over; another has a clock and a dashboard of its own."""
        self.clock.pause()
        short = self.alerts.too_short()
        if short:
            self.info_once(short)
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
            kind, f"{message}. Training continues; counted in lowrank/{self.label}_failures.", everywhere=everywhere
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

    def _count_losses(
        self,
        training: Training,
        step: int,
        recorders: Sequence[Recorder],
        host: Host,
        awaited: Mapping[str, set[str]],
    ) -> None:
        """Count sites that gave no number: at every sample what is not finite or not decomposed, once what was not
        read.

        A layer that is never used and a loss that cannot be seen are no failures of each sample. Where weights are no
        numbers that is said once, and nothing of what follows from it.
        """
        read = [host[f"{r.name}_lost"] for r in recorders if awaited[r.name]]
        silent = unreadable.since(training, step) if any(map(_is_silent, read)) else None
        self.no_number_since = None if silent is None else silent[0]
        if silent is not None:
            self.failures += sum(int((flags != 0).sum()) for flags in read)
            if silent[1]:
                self.warn_once(silent[1], 0)
            return
        for recorder in recorders:
            flags = dict(zip(recorder.sites, host[f"{recorder.name}_lost"], strict=True))
            missing = [site for site, flag in flags.items() if flag != 0 and site in awaited[recorder.name]]
            unread = {site for site in missing if np.isnan(flags[site])}
            known, self._unread[recorder.name] = self._unread.get(recorder.name, set()), unread
            lost = [site for site in missing if site not in known & unread]
            error = recorder.take_error()
            told, self._errors[recorder.name] = self._errors.get(recorder.name), error
            error = None if error == told and not lost else error
            if lost or error:
                where = (
                    f"{len(lost)} of {len(recorder.expected)} sites, the first is {named(lost[0])}"
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
            "training_time_ms": 1000 * self.clock.total,
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
            spent = f"it took {budget.overhead:.2g} % more time since the warm-up; {percent(budget.share)} was allowed"
            self._warn("budget", f"{spent}. The cadence stays at {each(budget.every)} to keep curves comparable.")
        known = {} if math.isnan(budget.overhead) else {"overhead_percent_after_warm_up": budget.overhead}
        return known | {"every_n_steps": float(budget.every)}


def _is_silent(flags: Array) -> bool:
    """Whether all that was read of something is no number."""
    read = flags[~np.isnan(flags)]
    return len(read) > 0 and bool((read != 0).all())


def _counts(recorders: Sequence[Recorder], host: Host) -> Iterator[tuple[str, Sequence[Array]]]:
    """What recorders count in cells, by the tag of its histogram: the middles of the cells, and how much is in each."""
    for recorder in recorders:
        for curve in (curve for curve in recorder.curves if curve.middles and curve.name in host):
            for site, middles, inside in zip(recorder.sites, host[curve.middles].T, host[curve.name].T, strict=True):
                if np.isfinite(inside).all():
                    yield "/".join(filter(None, (curve.name, site))), (middles, inside)
