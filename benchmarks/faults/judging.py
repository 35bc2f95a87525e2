"""When a training goes wrong as seen from outside, and when each rule says so: from its record alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import torch

from benchmarks.faults.recording import by_quantity
from benchmarks.faults.trainings import BEGIN, STEPS, Case
from lightning_lowrank import Alert, CusumAlert, DepartureAlert, SpikeAlert
from lightning_lowrank.reports.alerts.ready_made import default_alerts
from lightning_lowrank.reports.alerts.states import RuleState

# Steps in a row above the 99th percentile of healthy runs, of steps as near as this, at which a loss shows a fault.
LASTING, NEAR = 10, 10
# By how much a held-out loss, twice in a row, is above that of the healthy run of the same seed before harm is done.
HARM = 0.1
# Spreads of a departure; the loosest is a probe: a rule is for use only if half its threshold is quiet too.
LEVELS = (6.0, 12.0, 24.0)
PROBE = LEVELS[0]
# Of each quantity any site, and half of the sites.
QUORUMS: tuple[int | float, ...] = (1, 0.5)
EVERY_STEP = ("loss", "gradient_norm")
RIVALS = {"spike 6": SpikeAlert, "spike 16": SpikeAlert, "CUSUM 8": CusumAlert, "CUSUM 32": CusumAlert}
KURTOSIS = "activation_kurtosis"
# What monitors warn of by default; and what they call the quantities that are seen from outside.
DEFAULT = "default"
IN_MONITORS = {"loss": "step_loss", "gradient_norm": "step_gradient_norm"}
# Quantities of which claims are made, as medians over sites: no rule that users have looks at these.
CLAIMED = ("qk_update", "update_effective", "update_stable", "weight_stable")
MEDIAN = "departure 6 of the median"

Curves = Mapping[str, dict[int, float]]


@dataclass(frozen=True)
class Column:
    """A rule on a quantity."""

    quantity: str
    rule: Alert
    word: str

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.quantity}: {self.word}"


def columns(quantity: str, sites: Mapping[str, Mapping[int, float]]) -> Iterator[Column]:
    """All rules that are judged on a quantity."""
    if quantity in EVERY_STEP or quantity.startswith(KURTOSIS):
        learnt = {} if quantity in EVERY_STEP else {"window": 20, "warm_up_samples": 20}
        for word, rival in RIVALS.items():
            yield Column(quantity, rival(quantity, "*", float(word.split()[1]), **learnt), word)
    if quantity == "spread":
        return
    every = _spacing(sites)
    samples = 128 if every == 1 else max(10, 200 // every)
    for level in LEVELS:
        for quorum in QUORUMS if len(sites) > 1 else QUORUMS[:1]:
            rule = DepartureAlert(quantity, departure=level, quorum=quorum, warm_up_samples=samples, cooldown_steps=0)
            where = "half of the sites" if quorum != 1 else "any site" if len(sites) > 1 else ""
            yield Column(quantity, rule, f"departure {level:g} {where}".strip())
    for rule in default_alerts([IN_MONITORS.get(quantity, quantity)]):
        if rule.of_sites:
            yield Column(quantity, replace(rule, quantity=quantity), f"{DEFAULT}, {rule.conditions[0]}")


def alarms(curves: Curves) -> dict[str, list[int]]:
    """Steps at which each rule began to fire in a training, by name; rules that judged anything."""
    found = {}
    for quantity, sites in by_quantity(curves).items():
        for column in columns(quantity, sites):
            found[column.name] = steps(column, sites)
        if quantity.startswith(CLAIMED):
            rule = DepartureAlert(quantity, departure=PROBE, cooldown_steps=0)
            found[f"{quantity}: {MEDIAN}"] = steps(Column(quantity, rule, MEDIAN), {"": _medians(sites)})
    return found


def steps(column: Column, sites: Mapping[str, Mapping[int, float]]) -> list[int]:
    """Steps at which a rule began to fire."""
    state = RuleState(column.rule, column.quantity, "rule")
    rows: dict[int, dict[str, float]] = {}
    for site, curve in sites.items():
        for step, value in curve.items():
            rows.setdefault(step, {})[site] = value
    events = (state.observe(step, rows[step], {}) for step in sorted(rows))
    return [event.step for event in events if event is not None and event.state == "firing"]


def samples(curves: Curves) -> dict[str, int]:
    """Number of samples of each quantity."""
    return {quantity: max(map(len, sites.values())) for quantity, sites in by_quantity(curves).items()}


def shows(losses: Mapping[int, float], healthy: Sequence[Mapping[int, float]]) -> int | None:
    """First of ten steps in a row at which the loss is above the 99th percentile of healthy runs at that step."""
    kept = torch.tensor([list(losses_.values()) for losses_ in healthy], dtype=torch.float64)
    padded = torch.nn.functional.pad(kept, (NEAR, NEAR), mode="replicate").unfold(-1, 2 * NEAR + 1, 1)
    limit = padded.movedim(0, -2).flatten(-2).nanquantile(0.99, -1)
    loss = torch.tensor(list(losses.values()), dtype=torch.float64)
    return first_of(~(loss <= limit))


def spreads_out(spread: Mapping[int, float]) -> int | None:
    """First of ten steps in a row at which features are all but the same for all inputs."""
    return first_of(torch.tensor(list(spread.values())) < 0.2)


def first_of(signs: torch.Tensor) -> int | None:
    """Where the first row of `LASTING` true ones begins."""
    if len(signs) < LASTING:
        return None
    lasting = signs.unfold(0, LASTING, 1).all(-1).nonzero()
    return int(lasting[0]) if len(lasting) else None


def harm(held_out: Mapping[int, float], healthy: Mapping[int, float]) -> int | None:
    """First of two steps in a row at which the held-out loss is far above that of the healthy run."""
    worse = [not held_out[step] <= healthy[step] + HARM for step in held_out]
    pairs = zip(held_out, pairwise(worse), strict=False)
    return next((step for step, pair in pairs if all(pair)), None)


@dataclass(frozen=True)
class Outcome:
    """One training, judged.

    Attributes:
        seed: Of it.
        shown: Step at which the loss (of SimSiam the spread of the features) shows the fault.
        harmed: Step at which the held-out loss shows harm.
        alarms: Steps at which rules began to fire.
        samples: How many each quantity has.
    """

    seed: int
    shown: int | None
    harmed: int | None
    alarms: Mapping[str, Sequence[int]]
    samples: Mapping[str, int]


def begin(case: Case) -> int:
    """Step from which on something is wrong."""
    return BEGIN if case.steps == STEPS else 0


def first(outcome: Outcome, names: Sequence[str], since: int) -> int | None:
    """Step of the first alarm of some rules, from a step on."""
    return min((step for name in names for step in outcome.alarms.get(name, ()) if step >= since), default=None)


def quantity_of(name: str) -> str:
    """Of a rule."""
    return name.split(": ")[0]


def level_of(name: str) -> float:
    """Spreads of a departure; NaN of another rule."""
    words = name.split(": ")[1].split()
    return float(words[1]) if words[0] == "departure" else math.nan


def _medians(sites: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Over sites, by step."""
    found = {step: [curve[step] for curve in sites.values() if step in curve] for step in next(iter(sites.values()))}
    return {step: median(values) for step, values in found.items()}


def _spacing(sites: Mapping[str, Mapping[int, float]]) -> int:
    known = sorted(next(iter(sites.values())))
    return int(median(b - a for a, b in pairwise(known))) if len(known) > 1 else 1
