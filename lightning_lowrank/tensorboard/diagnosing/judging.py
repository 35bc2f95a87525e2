"""Rules held against the curves of a run: which hold at its end, where, and since when.

Shape letters:  T samples   S sites
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_lowrank.tensorboard.series import Table
from lightning_lowrank.tensorboard.site import page

Severity = Literal["critical", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "info")
Array = NDArray[np.float64]
# Samples at the end in which a rule has to hold; with fewer there is nothing to say.
LASTING = 3
# A run whose loss is NaN in so many samples at its end has no way back.
LOST = 2
# What the tab shows in the place of a site for numbers of the whole model.
WHOLE_MODEL = "whole model"
DOCS = page("how-to/diagnose")
# As `LossMonitor` calls it.
LOSS = "step_loss"
# Of examples that are not trained on: what users log.
HELD_OUT = "held_out_loss"
# Ends of the names of what is a number whatever becomes of the run.
CONSTANT = (
    *("_chance", "_floor", "_start", "_random_walk", "_rows", "_width", "_valid", "_count", "_examples", "_samples"),
    *("_experts", "_tokens", "_decades"),
)


@dataclass(frozen=True)
class Condition:
    """A number of each site, or one of all, beyond a threshold.

    Attributes:
        quantity: Its name, without the prefix that a monitor was given; "a / b" is one beside another at the same site,
            such as its chance level. Of several the first that is there.
        below: It holds below this,
        above: or above it.
        relative_to: "first": multiples of the site's first number; "lowest": of its lowest so far; "sites": of the
            median over sites; "before": of its own median in the window before.
        pooled: The median over sites instead of each.
        window: Share of the run's samples whose trailing median is looked at; single samples where it is 0.
        ever: It holds from the sample on at which the number was there, whatever it was later.
    """

    quantity: str | tuple[str, ...]
    below: int | float = np.nan
    above: int | float = np.nan
    relative_to: Literal["", "first", "lowest", "sites", "before"] = ""
    pooled: bool = False
    window: int | float = 0
    ever: bool = False

    @property
    def band(self) -> str:
        """The healthy range."""
        return f"at least {self.below:g}" if np.isfinite(self.below) else f"at most {self.above:g}"


@dataclass(frozen=True)
class Rule:
    """What an expert would say about some curves.

    Attributes:
        name: For programs.
        severity: "critical": this run is lost or wasted; "warning": somebody should look; "info": worth to know.
        conditions: All hold at one site in the last samples; the first one's number is told.
        says: The finding, of `{value}`.
        reason: Why the thresholds are what they are.
        cause: What usually causes it.
        advice: What to try.
        page: Where it is explained.
        monitor: Who measures what it looks at.
    """

    name: str
    severity: Severity
    conditions: tuple[Condition, ...]
    says: str
    reason: str
    cause: str
    advice: str
    page: str
    monitor: str = "RankMonitor"


@dataclass(frozen=True)
class Finding:
    """A rule that holds.

    Attributes:
        rule: Its name.
        severity: Of the rule.
        site: The worst one, "whole model" where there are none.
        quantity: Whose number it is.
        since: Step from which on it has held without a break.
        message: All of it in words.
        value: The number at the end.
        band: What is healthy.
        num_sites: Where it holds.
        says: The finding alone.
        cause: What usually causes it.
        advice: What to try.
        page: Where it is explained.
    """

    rule: str
    severity: Severity
    site: str
    quantity: str
    since: int
    message: str
    value: float
    band: str
    num_sites: int = 1
    says: str = ""
    cause: str = ""
    advice: str = ""
    page: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"value": self.value if np.isfinite(self.value) else None}


@dataclass(frozen=True)
class Judged:
    """A condition on the curves of a run.

    Attributes:
        quantity: The one that was there.
        steps: `[T]`
        sites: `[S]`
        values: What is compared with the threshold, `[T, S]`.
        holds: Where it is beyond, `[T, S]`.
    """

    quantity: str
    steps: NDArray[np.int64]
    sites: Sequence[str]
    values: Array
    holds: NDArray[np.bool_]


Curves = Mapping[str, Table]


def diagnose(curves: Curves, rules: Sequence[Rule]) -> list[Finding]:
    """Findings for the curves of a run, worst first: by severity, then in the order of the rules.

    Args:
        curves: By quantity.
        rules: All that are asked.
    """
    found = [finding for rule in rules for finding in _findings(rule, curves)]
    lost = _without_numbers(curves)
    found = [*([lost] if lost else []), *found, *_unjudged(curves, rules)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _findings(rule: Rule, curves: Curves) -> Iterator[Finding]:
    judged = [judge(condition, curves) for condition in rule.conditions]
    known = [one for one in judged if one is not None]
    if len(known) < len(judged) or min(len(one.steps) for one in known) < LASTING:
        return
    first, *others = known
    holds = first.holds.copy()
    for other in others:
        holds &= _aligned(other, first)
    lasting = holds[-LASTING:].all(0)
    if not lasting.any():
        return
    last = first.values[-1]
    upwards = np.isfinite(rule.conditions[0].above)
    score = np.where(lasting, last if upwards else -last, -np.inf)
    worst = int(np.nanargmax(score))
    breaks = np.flatnonzero(~holds[:, worst])
    since = int(first.steps[breaks[-1] + 1 if len(breaks) else 0])
    yield finding_of(rule, first.quantity, first.sites[worst], float(last[worst]), since, int(lasting.sum()))


def finding_of(rule: Rule, quantity: str, site: str, value: float, since: int, num_sites: int) -> Finding:
    """In words."""
    more = f" and at {num_sites - 1} more" if num_sites > 1 else ""
    says = rule.says.format(value=f"{value:.3g}")
    band = rule.conditions[0].band if rule.conditions else ""
    healthy = f" (healthy: {band})" if band else ""
    what = f"{site}{more}: {says}{healthy} since step {since}"
    message = f"{what}. Usual cause: {rule.cause}. Try: {rule.advice}. See {rule.page}"
    words = {"says": says, "cause": rule.cause, "advice": rule.advice, "page": rule.page}
    return Finding(rule.name, rule.severity, site, quantity, since, message, value, band, num_sites, **words)


def judge(condition: Condition, curves: Curves) -> Judged | None:
    """A condition at every sample; None where the run does not have its quantity."""
    there = _asked(condition, curves)
    if not there:
        return None
    quantity, *beside = there
    table = curves[quantity]
    values = table.values.astype(np.float64)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # all of a row may be NaN
        for other in beside:
            values = values / _on(curves[other], table)
        sites: Sequence[str] = table.sites
        if condition.pooled:
            values, sites = np.nanmedian(values, 1, keepdims=True), [WHOLE_MODEL]
        if condition.relative_to == "before":
            values = values / _before(values, condition.window)
        else:
            values = _relative(_smooth(values, condition.window), condition.relative_to)
        if condition.ever:
            values = (np.fmax if np.isfinite(condition.above) else np.fmin).accumulate(values)
        holds = values < condition.below if np.isfinite(condition.below) else values > condition.above
    return Judged(quantity, table.steps, sites, values, holds)


def _asked(condition: Condition, curves: Curves) -> list[str]:
    """The quantities that it looks at: those of the first of its names that the run has."""
    names = (condition.quantity,) if isinstance(condition.quantity, str) else condition.quantity
    return next((found for name in names if (found := _there(name, curves))), [])


def _there(name: str, curves: Curves) -> list[str]:
    """The quantities of "a / b", nothing if one is missing or has no sample."""
    found: list[str] = []
    for part in name.split(" / "):
        quantity = _named(part, curves, found[0] if found else "")
        if quantity is None or not len(curves[quantity].steps):
            return []
        found.append(quantity)
    return found


def _named(name: str, curves: Curves, beside: str = "") -> str | None:
    """The quantity of that name, with any prefix; of several the one with the prefix of another quantity."""
    found = [quantity for quantity in curves if quantity == name or quantity.endswith(f"_{name}")]
    own = [quantity for quantity in found if quantity.removesuffix(name) in beside]
    return min(own or found, key=len, default=None)


def _on(other: Table, table: Table) -> Array:
    """What another quantity was at the samples and sites of a table, NaN where it was not."""
    values = np.full((len(table.steps), len(table.sites)), np.nan)
    if not len(other.steps):
        return values
    rows = np.searchsorted(other.steps, table.steps, "right") - 1
    column = {site: i for i, site in enumerate(other.sites)}
    for j, site in enumerate(table.sites):
        if site in column or len(other.sites) == 1:
            values[:, j] = np.where(rows >= 0, other.values[rows, column.get(site, 0)], np.nan)
    return values


def _smooth(values: Array, window: int | float) -> Array:
    """Trailing medians; of the first samples, of as many as there are."""
    width = max(1, round(window * len(values)))
    if width == 1:
        return values
    return np.stack([np.nanmedian(values[max(0, i + 1 - width) : i + 1], 0) for i in range(len(values))])


def _before(values: Array, window: int | float) -> Array:
    """Medians of the samples before each, NaN for those that have not so many before them."""
    width = max(LASTING, round(window * len(values)))
    medians = [np.nanmedian(values[i - width : i], 0) for i in range(width, len(values))]
    unknown = np.full((min(width, len(values)), values.shape[1]), np.nan)
    return np.concatenate([unknown, *([np.stack(medians)] if medians else [])])


def _relative(values: Array, to: str) -> Array:
    if to == "first":
        return values / _first(values)
    if to == "lowest":
        return values / np.fmin.accumulate(values)
    return values / np.nanmedian(values, 1, keepdims=True) if to == "sites" else values


def _first(values: Array) -> Array:
    """The first number of each site that is finite and not 0."""
    known = np.isfinite(values) & (values != 0)
    return np.where(known.any(0), values[known.argmax(0), np.arange(values.shape[1])], np.nan)


def _aligned(other: Judged, first: Judged) -> NDArray[np.bool_]:
    """Where another condition holds, at the samples and sites of the first."""
    table = Table(other.steps, list(other.sites), other.holds.astype(np.float32))
    return _on(table, Table(first.steps, list(first.sites), first.values.astype(np.float32))) > 0


def _without_numbers(curves: Curves) -> Finding | None:
    """All is NaN from a step on, or the loss is."""
    since, loss = silent_since(curves), _loss(curves)
    if since is None and loss is not None and len(loss.steps) >= LASTING:
        since = None if np.isfinite(loss.values[-LOST:]).any() else _ends({LOSS: loss})
    return None if since is None else finding_of(NO_NUMBER, "", WHOLE_MODEL, np.nan, since, 1)


def silent_since(curves: Curves) -> int | None:
    """The step from which on a run has no number, None where the last sample of any quantity has one.

    By the loss where there is one: weights that are NaN in one layer leave the others until the next step.
    """
    since, loss = _ends({name: curves[name] for name in curves if not name.endswith(CONSTANT)}), _loss(curves)
    lost = None if since is None or loss is None else _ends({LOSS: loss})
    return since if since is None or lost is None else min(since, lost)


def _loss(curves: Curves) -> Table | None:
    name = _named(LOSS, curves)
    return None if name is None else curves[name]


def _ends(tables: Curves) -> int | None:
    """The first step from which on nothing is finite, in no table; None where the last sample of one is."""
    read = []
    for table in tables.values():
        if len(table.steps) and np.isfinite(table.values[-1]).any():
            return None
        read += [table] if len(table.steps) else []
    last = max((int(t.steps[np.isfinite(t.values).any(1)].max(initial=-1)) for t in read), default=-1)
    return min((int(step) for table in read for step in table.steps if step > last), default=None)


def _unjudged(curves: Curves, rules: Sequence[Rule]) -> Iterator[Finding]:
    """Quantities of which rules would say something, with too few samples for it or with none in the second half."""
    names = {name for rule in rules for condition in rule.conditions for name in _asked(condition, curves)}
    steps = {name: curves[name].steps for name in sorted(names)}
    few = [name for name in steps if len(steps[name]) < LASTING]
    ends = [int(end) for name in curves for end in (*curves[name].steps[:1], *curves[name].steps[-1:])]
    old = [name for name in steps if name not in few and 2 * steps[name][-1] < min(ends) + max(ends)]
    for rule, some in ((FEW, few), (OLD, old)):
        if some:
            count = f"{len(some)} of {len(names)} quantities {'has' if len(some) == 1 else 'have'}"
            step = int(max(steps[name][-1] for name in some))
            first = f": {some[0]}" if len(some) == 1 else f", such as {some[0]}"
            says = f"{count} {rule.says.format(value=LASTING, step=step, end=max(ends))}{first}"
            message = f"{says}. {rule.reason}. Try: {rule.advice}. See {rule.page}"
            known = (rule.name, rule.severity, WHOLE_MODEL, some[0], step, message, float(len(some)), "", 1)
            yield Finding(*known, says, rule.cause, rule.advice, rule.page)


NO_NUMBER = Rule(
    "diverged",
    "critical",
    (),
    "no number",
    "a number that is NaN everywhere and stays so means that the run has failed",
    "a NaN or infinite loss: a learning rate that is too high, an overflow in half precision, or a division by zero",
    "the last checkpoint before it, a smaller learning rate, clipping, or bfloat16 instead of float16",
    f"{DOCS}#diverged",
)
FEW = Rule(
    "too-few-samples",
    "info",
    (),
    "fewer than {value} samples",
    "They are not judged",
    "a run of only a few samples",
    "a smaller every_n_steps, a larger max_overhead (watch_all(0.1)), or a longer run",
    f"{DOCS}#too-few-samples",
)
OLD = Rule(
    "old-samples",
    "info",
    (),
    "no sample after step {step} of {end}",
    "What they say does not cover the rest of the run",
    "a budget that allowed no more samples, or a monitor that was stopped",
    FEW.advice,
    f"{DOCS}#old-samples",
)
