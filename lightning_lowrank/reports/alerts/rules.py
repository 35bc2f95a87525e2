"""What an alert is: which numbers it looks at, what it compares them with, what follows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from re import ASCII, fullmatch
from typing import Any, Literal, get_args

Action = Literal["warn", "log", "wandb", "checkpoint", "stop", "raise"]
Severity = Literal["info", "warn", "error"]
Baseline = Literal["running", "warm-up", "healthy"]

# Conditions, each of which is enough.
CONDITIONS = ("below", "above", "drop", "rise", "slope", "change", "departure", "spike", "cusum", "non_finite")
SHARES = ("drop", "slope", "non_finite")
POSITIVE = ("rise", "change", "departure", "spike", "cusum")
# Numbers that are counts, and the least of each.
COUNTS = {
    "window": 2,
    "for_samples": 1,
    "keep_samples": 1,
    "cooldown_steps": 0,
    "warm_up_samples": 0,
    "warm_up_steps": 0,
}
# Samples of the warm-up that a condition needs: a baseline; its spread.
NEEDED = {"drop": 1, "rise": 1, "change": 5, "departure": 10, "spike": 10, "cusum": 10}


class AlertError(RuntimeError):
    """An alert fired whose rule asks for this: `actions` has "raise"."""


# Options of a rule that reports an event as soon as it is seen, whatever it is.
EVENT: dict[str, Any] = {"severity": "info", "for_samples": 1, "warm_up_samples": 0}


@dataclass(frozen=True)
class Violation:
    """A number on the wrong side of a threshold.

    Attributes:
        condition: The name of the rule's condition.
        threshold: What was not to be passed.
        excess: By how much it was, as a share of the threshold: what is worst has most.
    """

    condition: str
    threshold: float
    excess: float


@dataclass(frozen=True)
class SiteAlert:
    """One site of an alert.

    Attributes:
        site: Name of the site.
        value: The latest number; for `slope` too, which is of the last ones.
        error: Bound on the error of the number, 0 where it is exact.
        baseline: Of the time before, NaN where there is none.
        condition: What was violated when it was last.
        threshold: Of that condition.
        since: Step of the first sample that violated it.
    """

    site: str
    value: float
    error: float
    baseline: float
    condition: str
    threshold: float
    since: int


@dataclass(frozen=True)
class AlertEvent:
    """A rule began to fire, fires at more sites, or has calmed down: what users' functions are given.

    Attributes:
        rule: Name of the rule.
        state: Whether it fires or is over.
        severity: As the rule says.
        quantity: What it looks at.
        step: Of the sample.
        since: Step of the first sample that violated it.
        title: At most 63 characters.
        message: What, where, how much against what, since when, why, and where it is explained.
        num_firing: Sites at which it fires.
        num_sites: Sites that it looks at.
        worst: The worst of them, at most five; once it is over, some at which it fired.
    """

    rule: str
    state: Literal["firing", "resolved"]
    severity: Severity
    quantity: str
    step: int
    since: int
    title: str
    message: str
    num_firing: int
    num_sites: int
    worst: tuple[SiteAlert, ...]


@dataclass(frozen=True)
class Alert:
    """A rule: a quantity at some sites, conditions of which one is enough, how patient it is, and what follows.

    At each site it is ok, pending (violated in fewer than `for_samples` samples in a row) or firing. A number that is
    not there or not finite counts neither way. Of an estimated quantity the bound of its error is compared: it fires
    only if the number is certainly beyond.

    Args:
        quantity: Its name as in `monitor.latest.values`, `weight_stable_rank`; a monitor's own prefix may be left out.
        sites: Globs of the sites to look at.
        below: Least number allowed.
        above: Largest number allowed.
        drop: Share of the baseline by which it may fall, 0.5 for a half.
        rise: The same upwards; 2.0 allows up to three times the baseline.
        slope: Share of its mean by which it may fall per sample: least squares over the last `window` samples.
        change: A change point, either way: how many spreads it may be away from the baseline (a spread is 1.4826 times
            the median distance from the median, and at least 2 % of that). After it has fired the baseline is learnt
            anew, which takes `window` samples.
        departure: How many spreads it may be away from the baseline, either way, as for `change`; it fires until the
            number is back.
        spike: How many standard deviations it may be above the mean of the samples that the baseline is made of.
        cusum: How far it may have drifted upwards in all: the excess over the baseline, in spreads and each time half a
            spread less, is added up from sample to sample, and begins anew where the sum falls below 0.
        non_finite: Share of the sites that may be without a finite number in a sample.
        baseline: "running": median of the last `window` samples before the violation. "warm-up": of those of the
            warm-up, which stays for good. "healthy": of all samples after `warm_up_steps` that violated nothing,
            thinned to at most `window`: the run's own earlier distribution, so that the spread has its drift in it.
        window: Samples, for running baselines and slopes.
        for_samples: Samples in a row that must violate before it fires.
        keep_samples: Samples in a row that must be well again before it is over.
        hysteresis: How far from the threshold "well" begins: a share of the threshold, or of the way back to the
            baseline.
        quorum: Sites that must be firing: a number, or (below 1.0) a share.
        cooldown_steps: Steps between two messages; what begins in between is told when they are over, if it still
            fires.
        warm_up_samples: Numbers of a site to learn from before it is judged.
        warm_up_steps: Steps before which nothing is judged either: those of the learning rate's warm-up.
        severity: Word for loggers that know such.
        actions: `warn`, `log` (scalar, table and JSON lines), `wandb` (its alert, where its logger is), `checkpoint`,
            `stop`, `raise`.
        call: A function of an `AlertEvent`, called in a thread of its own in the first process.
        call_timeout: Seconds after which it is given up, and not called again.
        cause: What usually is behind it; there is something general for every source.
        name: Of the rule, for tags; made from the quantity and its conditions unless given.

    Raises:
        ValueError: There is no condition, or a number makes no sense.

    References:
        Page (1954), Continuous Inspection Schemes, Biometrika 41: `cusum`. `spike` is the spike score of OLMo (2024),
        arXiv 2501.00656: 6 standard deviations, a window of 128.
    """

    quantity: str
    sites: str | Sequence[str] = "*"
    _: KW_ONLY
    below: float | None = None
    above: float | None = None
    drop: float | None = None
    rise: float | None = None
    slope: float | None = None
    change: float | None = None
    departure: float | None = None
    spike: float | None = None
    cusum: float | None = None
    non_finite: float | None = None
    baseline: Baseline = "running"
    window: int = 10
    for_samples: int = 3
    keep_samples: int = 3
    hysteresis: float = 0.1
    quorum: int | float = 1
    cooldown_steps: int = 500
    warm_up_samples: int = 10
    warm_up_steps: int = 0
    severity: Severity = "warn"
    actions: Sequence[Action] = ("warn", "log", "wandb")
    call: Callable[[AlertEvent], Any] | None = None
    call_timeout: float = 10.0
    cause: str = ""
    name: str | None = None

    def __post_init__(self) -> None:
        for wrong in self._wrong():
            raise ValueError(f"alert on {self.quantity!r}: {wrong}")

    @property
    def conditions(self) -> list[str]:
        """Names of those that it has."""
        return [name for name in CONDITIONS if getattr(self, name) is not None]

    @property
    def of_sites(self) -> bool:
        """Whether it judges sites one by one."""
        return self.conditions != ["non_finite"]

    def _wrong(self) -> list[str]:
        """What makes no sense, in words."""
        given: dict[str, float] = {name: getattr(self, name) for name in self.conditions}
        needed = max((NEEDED.get(name, 0) for name in given), default=0)
        learnt = self.warm_up_samples if self.baseline == "warm-up" else min(self.warm_up_samples, self.window)
        wrong = {
            f"give at least one of {CONDITIONS}": not given,
            **{f"{name}={x!r} must be a finite number": not math.isfinite(x) for name, x in given.items()},
            **{
                f"{name}={x!r} must be a share above 0 and below 1": not 0 < x < 1
                for name, x in given.items()
                if name in SHARES
            },
            **{f"{name}={x!r}: above 0": x <= 0 for name, x in given.items() if name in POSITIVE},
            f"hysteresis={self.hysteresis!r} must be at least 0 and below 1": not 0 <= self.hysteresis < 1,
            (
                f"quorum={self.quorum!r} must be a number of sites of at least 1, or a share above 0 and at most 1.0"
            ): not self._has_quorum(),
            f"name={self.name!r} may contain only letters, digits, '_', '.' and '-'": not fullmatch(
                r"[\w.-]+", self.name or "x", ASCII
            ),
            f"call={self.call!r} must be a function of an AlertEvent (a dotted path works only in YAML)": not callable(
                self.call or print
            ),
            f"call_timeout={self.call_timeout!r} must be a number of seconds above 0": not self.call_timeout > 0,
            f"{needed} samples or more are needed to learn from (warm_up_samples, window), for {list(given)}": learnt
            < needed,
        }
        return [*self._wrong_words(), *self._wrong_counts(), *(words for words, is_wrong in wrong.items() if is_wrong)]

    def _wrong_words(self) -> list[str]:
        one_of = {"baseline": get_args(Baseline), "severity": get_args(Severity)}
        wrong = [
            f"{name}={getattr(self, name)!r} must be one of {words}"
            for name, words in one_of.items()
            if getattr(self, name) not in words
        ]
        if isinstance(self.actions, str) or not set(self.actions) <= set(get_args(Action)):
            wrong.append(f"actions={self.actions!r} must be a list with some of {get_args(Action)}")
        return wrong

    def _wrong_counts(self) -> list[str]:
        values = {name: getattr(self, name) for name in COUNTS}
        return [
            f"{name}={x!r} must be a whole number of at least {COUNTS[name]}"
            for name, x in values.items()
            if not _counts(x, COUNTS[name])
        ]

    def _has_quorum(self) -> bool:
        return _counts(self.quorum, 1) or (isinstance(self.quorum, float) and 0 < self.quorum <= 1)


def _counts(number: object, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least
