"""The first words of every monitor: what it watches, where, how often, in how many samples, and what one costs."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby
from statistics import median

from lightning_lowrank.measuring.allowances import FEWEST, Allowance, Purse
from lightning_lowrank.measuring.clock import Clock
from lightning_lowrank.measuring.number_source import WHOLE_MODEL
from lightning_lowrank.measuring.probe import Probe, due_at
from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.schedules import WARM_UP, Budget, Every, Spent

# Percent of the training time from which on the cost of a sample is told, and steps by which a step is known.
WORTH_SAYING, IDLE_STEPS = 2.0, 10
# Factor by which a cadence must differ from what was said last to be said again: steps of a busy machine vary as much.
FAR = 2


def start_line(recorders: Sequence[Recorder], total_steps: int | None) -> str:
    """A line about what a monitor will measure.

    Args:
        recorders: Its probes at work.
        total_steps: How long the run will be, if that is known.
    """
    alike = groupby(recorders, lambda r: (places(r.expected), _when(r.probe, total_steps)))
    return "; ".join(f"{listed(r.name for r in some)} at {where} {when}" for (where, when), some in alike)


def watched(label: str, recorders: Sequence[Recorder]) -> str:
    """Where a monitor that shares a budget looks."""
    alike = [(where, [r.name for r in some]) for where, some in groupby(recorders, lambda r: places(r.expected))]
    return "; ".join(where if names == [label] else f"{listed(names)} at {where}" for where, names in alike)


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
    return f"{each(every)} from now on: {times}, {percent(budget.share)} more time is allowed{samples}"


def of_all(purse: Purse) -> Iterator[str]:
    """Lines about monitors that share a budget: at the start all, later those with news."""
    told = [one for one in purse.members if one in purse.news or (one.is_left_out and not purse.has_begun)]
    if not purse.has_begun:
        yield from _beginning(purse)
    yield from _cadences(purse, [one for one in told if not one.is_left_out])
    yield from _left_out(purse, [one for one in told if one.is_left_out])
    purse.news, purse.has_begun = set(), True


def _beginning(purse: Purse) -> Iterator[str]:
    """Who watches what, and who has nothing to watch."""
    told = [f"{one.name} ({one.watches}{f', {each(one.every)}' if one.every else ''})" for one in _at_work(purse)]
    if told:
        needed = [one.name for one in _at_work(purse) if one.wish.needed]
        first = (
            f". The first {FEWEST} samples of {listed(needed)} are taken even if that takes longer" if needed else ""
        )
        yield f"at most {percent(purse.share)} more time for {listed(told)}{first}"
    if absent := [f"{one.name} ({one.absent})" for one in purse.members if one.absent]:
        yield f"left out of this run, as there is nothing to watch: {', '.join(absent)}"


def _at_work(purse: Purse) -> list[Allowance]:
    return [one for one in purse.members if one.watches]


def _cadences(purse: Purse, members: Sequence[Allowance]) -> Iterator[str]:
    """Cadences that were chosen, with their cost, and those that are far from what was said last."""
    told = []
    for one in members:
        every, total, before = one.every or 1, purse.total_steps, purse.said.get(one)
        if before is not None and max(every, before) < FAR * min(every, before):
            continue
        purse.said[one] = every
        if before is not None:
            told.append(f"{one.name} {each(every)} instead of {before}")
            continue
        samples = _in_whole(None if total is None else one.count(total), total)
        cost = f"{1000 * one.sample:.3g} ms a sample, {percent(one.sample / one.step / every)} more time{samples}"
        told.append(f"{one.name} {each(every)} ({cost})")
    if told:
        yield f"cadences for now, with {1000 * members[0].step:.3g} ms a step: {', '.join(told)}"


def _left_out(purse: Purse, members: Iterable[Allowance]) -> Iterator[str]:
    """Who takes no sample, or no other, by the reason."""
    total, whole, alike = purse.total_steps or 1, percent(purse.share), defaultdict(list)
    for one in members:
        is_known, missing = not math.isnan(one.sample), FEWEST - one.taken
        steps = one.sample / one.step if is_known else one.wish.cost
        took = f"{plain(1000 * one.sample)} ms or " if is_known else ""
        long = f"{plain(steps)} step{'' if plain(steps) == '1' else 's'}"
        more = f"{missing} more take" if one.taken else f"{missing} take"
        told = f"{one.name} (a sample takes {took}{long}, {more} {plain(100 * missing * steps / total)} %)"
        alike[bool(one.taken), is_known].append(told)
    for (has_samples, is_known), several in alike.items():
        what = "no more samples in" if has_samples else "left out of"
        less = f"too little is left of the {whole} for all monitors together"
        reason = less if is_known else f"all monitors together may take {whole} of {of_number(total, 'step')}"
        yield f"{what} this run, as {reason}: {', '.join(several)}"


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
