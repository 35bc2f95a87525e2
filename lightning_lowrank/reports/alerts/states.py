"""A rule at work: ok, pending or firing at every site, and when there is something to tell."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from lightning_lowrank.reports.alerts.messages import NAMED, SHARE, message_of, recovery_of, title_of
from lightning_lowrank.reports.alerts.rules import NEEDED, Alert, AlertEvent, SiteAlert, Violation

# Spread of a constant curve, as a share of its level: rounding is no change.
LEAST_SPREAD = 0.02
# Median distance from the median of a Gaussian, as a share of its standard deviation, inverted.
MAD_TO_DEVIATION = 1.4826
# What a CUSUM takes off each excess, in spreads: half of the smallest shift that it is to find (Page 1954).
ALLOWANCE = 0.5


@dataclass
class Track:
    """A rule at one site, in plain numbers: it is kept in checkpoints.

    Attributes:
        state: `ok`, `pending` or `firing`.
        seen: Numbers so far.
        judged: Those after the warm-up.
        since: Step of the first sample of the violation.
        in_a_row: Samples that violated, or while it fires samples that were well.
        told: Its firing has been in a message.
        history: Numbers that the baseline is made of; none is added while it is violated.
        recent: The last ones with their errors, whatever they were.
        baseline: Median of the history, as it was before the violation.
        spread: Around it.
        mean: Of the history.
        deviation: Its standard deviation.
        drift: The excesses over the baseline added up, in spreads.
        stride: Of a healthy baseline, one in so many samples is kept.
        skipped: Samples since the last that was.
        reason: The last violation.
    """

    state: str = "ok"
    seen: int = 0
    judged: int = 0
    since: int = -1
    in_a_row: int = 0
    told: bool = False
    history: list[float] = field(default_factory=list)
    recent: list[list[float]] = field(default_factory=list)
    baseline: float = math.nan
    spread: float = math.nan
    mean: float = math.nan
    deviation: float = math.nan
    drift: float = 0.0
    stride: int = 1
    skipped: int = 0
    reason: list[Any] = field(default_factory=lambda: ["", math.nan, 0.0])

    def see(self, rule: Alert, step: int, value: float, error: float) -> None:
        """Take the next number; one that is not finite counts neither way."""
        if not (math.isfinite(value) and math.isfinite(error)):
            return
        is_early = step < rule.warm_up_steps
        self.seen += not (is_early and rule.baseline == "healthy")
        self.recent = [*self.recent[1 - rule.window :], [value, error]]
        if is_early or self.seen <= rule.warm_up_samples:
            if not is_early or rule.baseline != "healthy":
                self._learn(rule, value)
            return
        self.judged += 1
        if rule.cusum is not None and self.spread > 0:
            excess = (value - self.baseline) / self.spread - ALLOWANCE
            # No more than twice what fires: it is over soon after the drift is.
            self.drift = min(max(0.0, self.drift + excess), 2 * rule.cusum)
        if self.state == "firing":
            self._calm(rule, value)
        else:
            self._judge(rule, step, value)

    def _judge(self, rule: Alert, step: int, value: float) -> None:
        """Whether it is violated, and has been for long enough."""
        violation = max(self._violations(rule, 0.0), key=lambda v: v.excess, default=None)
        if violation is None:
            self.state, self.in_a_row = "ok", 0
            if rule.baseline != "warm-up":
                self._learn(rule, value)
            return
        if self.state == "ok":
            self.state, self.since = "pending", step
        self.in_a_row += 1
        self.reason = [violation.condition, violation.threshold, violation.excess]
        if self.in_a_row >= rule.for_samples:
            self.state, self.in_a_row = "firing", 0
            if violation.condition == "change":
                self.history, self.stride, self.skipped = [], 1, 0

    def _calm(self, rule: Alert, value: float) -> None:
        """Whether it is well again, and has been for long enough."""
        if self.reason[0] == "change":  # it is over when the new level is known
            self._learn(rule, value, keep=True)
            self.in_a_row += 1
            is_over = self.in_a_row >= rule.window
            if is_over:
                self._weigh()
        else:
            violations = list(self._violations(rule, rule.hysteresis))
            self.in_a_row = 0 if violations else self.in_a_row + 1
            is_over = self.in_a_row >= rule.keep_samples
            worst = max(self._violations(rule, 0.0), key=lambda v: v.excess, default=None)
            if worst is not None:
                self.reason = [worst.condition, worst.threshold, worst.excess]
        if is_over:
            self.state, self.in_a_row, self.told = "ok", 0, False

    def _learn(self, rule: Alert, value: float, *, keep: bool = False) -> None:
        """Let a number into the history.

        Args:
            keep: The baseline stays as it is.
        """
        length = max(rule.window, rule.warm_up_samples) if rule.baseline == "warm-up" else rule.window
        if rule.baseline == "healthy":
            self._thin(length)
            if self.skipped:
                return
        self.history = [*self.history[1 - length :], value]
        if not keep and NEEDED.keys() & rule.conditions:
            self._weigh()
            if rule.spike is not None:
                self.mean = sum(self.history) / len(self.history)
                squares = sum((value - self.mean) ** 2 for value in self.history)
                self.deviation = math.sqrt(squares / len(self.history))

    def _thin(self, length: int) -> None:
        """Keep numbers of all of the time, as far apart as their number asks for."""
        self.skipped = (self.skipped + 1) % self.stride
        if not self.skipped and len(self.history) == length:
            self.history, self.stride = self.history[::2], 2 * self.stride

    def _weigh(self) -> None:
        self.baseline = _median(self.history)
        distance = _median([abs(value - self.baseline) for value in self.history])
        self.spread = max(MAD_TO_DEVIATION * distance, LEAST_SPREAD * abs(self.baseline))

    def _violations(self, rule: Alert, margin: float) -> Iterator[Violation]:
        """Conditions that the latest number violates.

        Args:
            margin: Share of the threshold, or of the way back to the baseline, by which it must be better.
        """
        value, error = self.recent[-1]
        # To begin to fire it must be beyond with all of its error; to be over it must be well with all of it.
        doubt = error if self.state == "firing" else -error
        for name, threshold, upper in self._limits(rule):
            subject, its_doubt = self._subject(name, value, doubt)
            way = margin * abs(threshold - (self.baseline if name in NEEDED and name != "cusum" else 0.0))
            beyond = (subject - threshold if upper else threshold - subject) + its_doubt + way
            if beyond > 0:
                yield Violation(name, threshold, beyond / (abs(threshold) or 1.0))

    def _subject(self, name: str, value: float, doubt: float) -> tuple[float, float]:
        """What a condition looks at, and its doubt."""
        match name:
            case "slope":
                return self._slope(doubt)
            case "cusum":
                return self.drift, doubt / self.spread
        return value, doubt

    def _limits(self, rule: Alert) -> Iterator[tuple[str, float, bool]]:
        """Condition, threshold and whether that is an upper one."""
        base, size = self.baseline, abs(self.baseline)
        if rule.below is not None:
            yield "below", rule.below, False
        if rule.above is not None:
            yield "above", rule.above, True
        if rule.drop is not None:
            yield "drop", base - rule.drop * size, False
        if rule.rise is not None and size > 0:
            yield "rise", base + rule.rise * size, True
        for name, spreads in (("change", rule.change), ("departure", rule.departure)):
            if spreads is not None and self.spread > 0:
                yield name, base - spreads * self.spread, False
                yield name, base + spreads * self.spread, True
        if rule.spike is not None and self.deviation > 0:
            yield "spike", self.mean + rule.spike * self.deviation, True
        if rule.cusum is not None and self.spread > 0:
            yield "cusum", rule.cusum, True
        if rule.slope is not None and len(self.recent) == rule.window:
            yield "slope", -rule.slope, False

    def _slope(self, doubt: float) -> tuple[float, float]:
        """Change per sample as a share of the mean, by least squares, and the bound of its error, with the sign of the
        doubt.
        """
        count = len(self.recent)
        values, errors = zip(*self.recent, strict=True)
        centred = [i - (count - 1) / 2 for i in range(count)]
        squares, mean = sum(x * x for x in centred), abs(sum(values) / count) or 1.0
        slope = sum(x * value for x, value in zip(centred, values, strict=True)) / squares / mean
        bound = sum(abs(x) * error for x, error in zip(centred, errors, strict=True)) / squares / mean
        return slope, math.copysign(bound, doubt)


@dataclass
class Told:
    """An alert from its first message until it is over.

    Attributes:
        step: Of the first message.
        since: First sample that violated it.
        sites: All that were in a message.
    """

    step: int
    since: int
    sites: list[str]


class RuleState:
    """A rule at all its sites: groups what begins to fire in a sample into one event.

    Args:
        rule: The rule.
        quantity: What it looks at, with the monitor's prefix.
        name: Under which it is known.
    """

    def __init__(self, rule: Alert, quantity: str, name: str) -> None:
        self.rule, self.quantity, self.name = rule, quantity, name
        self._globs = [rule.sites] if isinstance(rule.sites, str) else list(rule.sites)
        self._wanted: dict[str, bool] = {}
        others: dict[str, Any] = dict.fromkeys(("below", "drop", "rise", "slope", "change", "non_finite"))
        self._of_share = None if rule.non_finite is None else replace(rule, above=rule.non_finite, **others)
        self.begin()

    def begin(self) -> None:
        """Forget an earlier run."""
        self.tracks: dict[str, Track] = {}
        self.is_firing = False
        self.told: Told | None = None
        self.last_told: int | None = None

    @property
    def level(self) -> int:
        """0 ok, 1 pending somewhere, or firing at fewer sites than the quorum, 2 firing."""
        return 2 if self.is_firing else int(any(track.state != "ok" for track in self.tracks.values()))

    @property
    def could_fire(self) -> bool:
        """Whether enough samples came after the warm-up."""
        return any(track.judged >= self.rule.for_samples for track in self.tracks.values())

    @property
    def had_of_needed(self) -> tuple[int, int]:
        """Samples of the site that has most, and the number from which on the rule can fire."""
        had = max((track.seen for track in self.tracks.values()), default=0)
        return had, self.rule.warm_up_samples + self.rule.for_samples

    def matches(self, site: str) -> bool:
        """Whether it looks at this site."""
        if site not in self._wanted:
            self._wanted[site] = any(fnmatchcase(site, glob) for glob in self._globs)
        return self._wanted[site]

    def observe(self, step: int, values: Mapping[str, float], errors: Mapping[str, float]) -> AlertEvent | None:
        """Take a sample: what there is to tell, None if nothing."""
        sites = [site for site in values if self.matches(site)]
        if self.rule.of_sites:
            for site in sites:
                self.tracks.setdefault(site, Track()).see(self.rule, step, values[site], errors.get(site, 0.0))
        if self._of_share is not None and sites:
            share = sum(not math.isfinite(values[site]) for site in sites) / len(sites)
            self.tracks.setdefault(SHARE, Track()).see(self._of_share, step, share, 0.0)
        return self._due(step, self._firing(), {site: values[site] for site in sites})

    def _firing(self) -> list[str]:
        """Sites at which it fires, none if they are fewer than the quorum; the worst first."""
        sites = sorted(
            (s for s, track in self.tracks.items() if track.state == "firing"), key=lambda s: -self.tracks[s].reason[2]
        )
        quorum, judged = self.rule.quorum, len(self.tracks.keys() - {SHARE})
        needed = math.ceil(quorum * judged) if isinstance(quorum, float) else quorum
        return sites if SHARE in sites or len(sites) >= max(1, needed) else []

    def _due(self, step: int, firing: Sequence[str], values: Mapping[str, float]) -> AlertEvent | None:
        """The event that is due: not within the cooldown, and nothing twice."""
        self.is_firing = bool(firing)
        if not firing:
            over, self.told = self.told, None
            for track in self.tracks.values():
                track.told = False
            return None if over is None else self._event("resolved", step, over, values)
        cooled = self.last_told is None or step - self.last_told >= self.rule.cooldown_steps
        if not cooled or all(self.tracks[site].told for site in firing):
            return None
        self.last_told = step
        for site in firing:
            self.tracks[site].told = True
        now = Told(step, min(self.tracks[site].since for site in firing), list(firing))
        before = self.told
        self.told = now if before is None else replace(before, sites=[*dict.fromkeys([*before.sites, *firing])])
        return self._event("firing", step, now, values)

    def _event(self, state: Any, step: int, told: Told, values: Mapping[str, float]) -> AlertEvent:
        worst = tuple(self._site(site) for site in told.sites[:NAMED])
        num_firing = len(told.sites) if state == "firing" else 0
        num_sites = len(self.tracks.keys() - {SHARE}) or len(values)
        event = AlertEvent(
            self.name, state, self.rule.severity, self.quantity, step, told.since, "", "", num_firing, num_sites, worst
        )
        message = message_of(event, self.rule) if state == "firing" else recovery_of(event, told.sites, told.step)
        return replace(event, title=title_of(event), message=message)

    def _site(self, site: str) -> SiteAlert:
        track = self.tracks[site]
        value, error = track.recent[-1]
        condition = "non_finite" if site == SHARE else track.reason[0]
        return SiteAlert(site, value, error, track.baseline, condition, track.reason[1], track.since)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, which load with `weights_only=True`."""
        tracks = {site: asdict(track) for site, track in self.tracks.items()}
        return {
            "rule": self._numbers(),
            "firing": self.is_firing,
            "told": None if self.told is None else asdict(self.told),
            "last_told": self.last_told,
            "tracks": tracks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a stopped run, unless the rule has changed."""
        self.begin()
        if state.get("rule") == self._numbers():
            self.is_firing, self.last_told = state["firing"], state["last_told"]
            self.told = Told(**state["told"]) if state["told"] else None
            self.tracks = {site: Track(**track) for site, track in state["tracks"].items()}

    def _numbers(self) -> str:
        """What decides: two rules of the same numbers are in the same state."""
        left_out: dict[str, Any] = {
            "actions": (),
            "call": None,
            "call_timeout": 1.0,
            "cause": "",
            "name": None,
            "severity": "warn",
        }
        return repr(replace(self.rule, sites=tuple(self._globs), **left_out))


def _median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    if not ordered:
        return math.nan
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
