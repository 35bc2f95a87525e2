"""Alert rules: the numbers that they watch, what they compare them with, and the actions."""

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
    """Raised when an alert fires whose `actions` contain "raise"."""


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
    """A rule begins to fire, fires at more sites, or is over. Users' functions get this object.

    Attributes:
        rule: Name of the rule.
        state: Whether it fires or is over.
        severity: Severity of the rule.
        quantity: Quantity of the rule.
        step: Step of the sample.
        since: Step of the first sample that violated it.
        title: A title of at most 63 characters.
        message: What happened and where, the value and its threshold, since when, the usual cause, and a link to the
            explanation.
        num_firing: Number of sites at which it fires.
        num_sites: Number of sites that it watches.
        worst: The worst sites, at most five; if it is over, some at which it fired.
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
    """A rule: a quantity at some sites, conditions of which one is enough, the number of samples before it fires, and
    the actions.

    At each site it is ok, pending (violated in fewer than `for_samples` samples in a row) or firing. Missing numbers
    and numbers that are not finite are ignored. For an estimated quantity, the bound of its error is compared, so it
    fires only if the number is certainly beyond the threshold.

    Args:
        quantity: Its name as in `monitor.latest.values`, `weight_stable_rank`; a monitor's own prefix may be left out.
        sites: Globs of the sites to watch.
        below: Smallest allowed number.
        above: Largest allowed number.
        drop: Allowed decrease, as a share of the baseline; 0.5 for a half.
        rise: Allowed increase, as a share of the baseline; 2.0 allows up to three times the baseline.
        slope: Allowed decrease per sample, as a share of the mean, by least squares over the last `window` samples.
        change: A change point in either direction: allowed distance from the baseline in spreads. A spread is 1.4826
            times the median distance from the median, and at least 2 % of the median. After it has fired, it learns a
            new baseline from `window` samples.
        departure: Allowed distance from the baseline in either direction, in spreads as for `change`. It fires until
            the number is back.
        spike: Allowed distance above the mean of the baseline's samples, in standard deviations.
        cusum: Allowed upward drift. Excesses over the baseline, in spreads and each reduced by half a spread, are added
            up from sample to sample. The sum restarts if it falls below 0.
        non_finite: Allowed share of sites without a finite number in a sample.
        baseline: "running": median of the last `window` samples before the violation. "warm-up": median of the warm-up,
            which then stays fixed. "healthy": all samples after `warm_up_steps` without a violation, thinned to at most
            `window`. This is the run's own earlier distribution, so its spread includes drifts.
        window: Number of samples for running baselines and slopes.
        for_samples: Number of consecutive violating samples before it fires.
        keep_samples: Number of consecutive normal samples before it is over.
        hysteresis: Distance from the threshold at which numbers are normal again: a share of the threshold, or of the
            distance to the baseline.
        quorum: Sites that must fire: a number, or (below 1.0) a share.
        cooldown_steps: Steps between two messages. An alert that begins in between is reported afterwards if it still
            fires.
        warm_up_samples: Number of samples of a site to learn from before it is judged.
        warm_up_steps: Steps before which nothing is judged: those of the learning rate's warm-up.
        severity: Severity for loggers that have such levels.
        actions: `warn`, `log` (scalar, table and JSON lines), `wandb` (its alert, if its logger is used), `checkpoint`,
            `stop`, `raise`.
        call: A function of an `AlertEvent`, called in its own thread on the first process.
        call_timeout: Seconds after which the call is abandoned and not repeated.
        cause: The usual cause; by default a general one for each source.
        name: Name of the rule, for tags; by default made of the quantity and its conditions.

    Raises:
        ValueError: There is no condition, or a number is invalid.

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
        """Names of its conditions."""
        return [name for name in CONDITIONS if getattr(self, name) is not None]

    @property
    def of_sites(self) -> bool:
        """Whether it judges single sites."""
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
            **{f"{name}={x!r} must be above 0": x <= 0 for name, x in given.items() if name in POSITIVE},
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
