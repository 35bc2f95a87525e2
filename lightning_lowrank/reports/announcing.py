"""The first words of every monitor: what it watches, where, how often, in how many samples, and what one costs."""

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from statistics import median

from lightning_lowrank.measuring.allowances import FEWEST, SHORT, Allowance
from lightning_lowrank.measuring.clock import Clock
from lightning_lowrank.measuring.number_source import WHOLE_MODEL
from lightning_lowrank.measuring.probe import Probe, due_at
from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.schedules import WARM_UP, Budget, Every, Spent

# Percent of the training time from which on the cost of a sample is told, and steps by which a step is known.
WORTH_SAYING, IDLE_STEPS = 2.0, 10


def start_line(recorders: Sequence[Recorder], total_steps: int | None) -> str:
    """A line about what a monitor will measure.

    Args:
        recorders: Its probes at work.
        total_steps: How long the run will be, if that is known.
    """
    alike = groupby(recorders, lambda r: (places(r.expected), _when(r.probe, total_steps)))
    return "; ".join(f"{listed(r.name for r in some)} at {where} {when}" for (where, when), some in alike)


def num_samples(probes: Iterable[Probe], total_steps: int | None) -> int | None:
    """The fewest that one of them will have in a whole run; None where nobody knows."""
    counts = [_count(probe, total_steps) for probe in probes if probe.source.stage == "train"]
    known = [count for count in counts if count is not None]
    return min(known) if known and len(known) == len(counts) else None


def too_few(count: int | None, total_steps: int | None) -> str:
    """Advice if there will be no curve; otherwise empty."""
    if count is None or count >= FEWEST:
        return ""
    return (
        f"{of_number(count, 'sample')} in {of_number(total_steps or 0, 'step')} {'is' if count == 1 else 'are'} no "
        "curve. For more, use a smaller every_n_steps, or max_overhead=0.05, which samples as often as 5 % of the time "
        "allow"
    )


def chosen(budget: Budget, total_steps: int | None) -> str:
    """The cadence that a budget has chosen."""
    every = budget.every or 1
    times = f"a sample takes {1000 * budget.sample:.3g} ms, a step {1000 * budget.step:.3g} ms"
    samples = _in_whole(None if total_steps is None else budget.count(total_steps), total_steps)
    if isinstance(budget, Allowance):  # its share follows the costs of all, and may change
        return f"{each(every)} for now: {times}, {percent(budget.sample / budget.step / every)} more time{samples}"
    return f"{each(every)} from now on: {times}, {percent(budget.share)} more time is allowed{samples}"


def left_out(budget: Budget, total_steps: int | None) -> str:
    """Why a monitor that shares a budget with others takes no sample, or no other."""
    assert isinstance(budget, Allowance) and total_steps
    known = not math.isnan(budget.sample)
    steps = budget.sample / budget.step if known else budget.wish.cost
    took = f"{plain(1000 * budget.sample)} ms, as long as " if known else ""
    missing = FEWEST - budget.taken
    what, more = ("no more samples in", "more ") if budget.taken else ("left out of", "")
    share, whole = missing * steps / total_steps, percent(budget.purse.share)
    reason = f"all monitors together may take {whole}"
    if share <= budget.purse.share:
        reason = f"less is left of the {whole} for all monitors together"
    return (
        f"{what} this run: a sample takes about {took}{plain(steps)} step{'' if plain(steps) == '1' else 's'} of "
        f"training. {of_number(missing, f'{more}sample')} {'takes' if missing == 1 else 'take'} {plain(100 * share)} % "
        f"of {of_number(total_steps, 'step')}, and {reason}"
    )


class FirstSample:
    """The cost of a sample in steps of training, reported once after the first if the run will spend much on samples.

    Args:
        probes: Of the monitor.

    Attributes:
        waits: There is still something to be told.
    """

    def __init__(self, probes: Sequence[Probe]) -> None:
        schedules = [due_at(probe) for probe in probes if probe.source.stage == "train"]
        one = schedules[0] if schedules and all(schedule == schedules[0] for schedule in schedules) else None
        # What a budget takes is told when it has chosen.
        self._every = one if isinstance(one, Every) else None
        self.waits = self._every is not None
        self._samples: list[float] = []
        self._steps: list[float] = []
        self._before: Spent | None = None

    def step_begins(self, step: int, clock: Clock, total_steps: int | None) -> str:
        """The message that is due now; usually empty."""
        if self._every is None:
            return ""
        before, self._before = self._before, Spent(step, clock.own, clock.total)
        if before is None:
            return ""
        own, total = self._before.own - before.own, self._before.total - before.total
        if self._every(before.step):
            self._samples.append(own)
        if self._samples:
            self._steps.append(total - own)
        if len(self._steps) <= IDLE_STEPS:
            return ""
        # The first sample and the first step also pay for what is made once.
        later, several = self._samples[1:] or self._samples, len(self._samples) > 1
        share = self._every.count(total_steps) / total_steps if total_steps else 1 / self._every.n
        self._every, self.waits = None, False
        return _cost(median(later), max(median(self._steps[1:]), 1e-6), share, several=several)


def _cost(sample: float, step: float, share: float, *, several: bool) -> str:
    """What samples take at a share of the steps, where that is worth a sentence."""
    whole = 100 * share * sample / step
    if whole <= WORTH_SAYING:
        return ""
    took = "a sample takes" if several else "the first sample took"
    return (
        f"{took} {plain(1000 * sample)} ms, as long as {plain(sample / step)} steps of training. If all samples do, "
        f"training takes {plain(whole)} % longer; reduce it with every_n_steps or max_overhead=0.01"
    )


def plain(number: float) -> str:
    """Two digits, or all before the point: `0.35`, `2.4`, `128`."""
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"


def places(sites: Collection[str]) -> str:
    """The places for which a monitor has numbers; among others, the whole model does not count as a site."""
    parts = sum(site != WHOLE_MODEL for site in sites)
    whole = [named(WHOLE_MODEL)] if WHOLE_MODEL in sites else []
    return " and ".join([*([of_number(parts, "site")] if parts else []), *whole]) or "its sites"


def named(site: str) -> str:
    """A site in a sentence."""
    return "the whole model" if site == WHOLE_MODEL else repr(site)


def of_number(count: int, word: str) -> str:
    """`1 sample`, `2 samples`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def each(steps: int) -> str:
    """`every step`, `every 2 steps`."""
    return "every step" if steps == 1 else f"every {steps} steps"


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def percent(share: float) -> str:
    """A share in words."""
    return f"{100 * share:.3g} %"


def _when(probe: Probe, total_steps: int | None) -> str:
    if probe.source.stage == "validation":
        return "at every validation"
    samples = _in_whole(_count(probe, total_steps), total_steps)
    match probe.schedule:
        case Every(n=steps) | Budget(every=int(steps)):
            return each(steps) + samples
        case Allowance() as shared:
            rest = "" if shared.wish.needed else ", or none"
            fewest = f": at least {FEWEST} samples in {total_steps} steps{rest}" if (total_steps or 0) >= SHORT else ""
            return f"within {percent(shared.purse.share)} more time for all monitors together{fewest}"
        case Budget() as budget:
            return f"for at most {percent(budget.share)} more time, measured in the first {WARM_UP} steps{samples}"
    return "as scheduled"


def _in_whole(count: int | None, total_steps: int | None) -> str:
    return "" if count is None else f": {of_number(count, 'sample')} in {of_number(total_steps or 0, 'step')}"


def _count(probe: Probe, total_steps: int | None) -> int | None:
    """Samples in a whole run, where the schedule says so beforehand."""
    schedule = due_at(probe)
    if total_steps is None or not isinstance(schedule, Every | Budget) or probe.source.stage != "train":
        return None
    return schedule.count(total_steps)
