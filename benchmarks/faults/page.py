"""The tables of `docs/evidence/warnings.md`, written from the outcomes of all trainings."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from benchmarks.faults.judging import DEFAULT, LEVELS, MEDIAN, PROBE, Outcome, begin, first, level_of, quantity_of
from benchmarks.faults.trainings import CASES, Case

# False alarms of all defaults together, in a thousand healthy steps.
ALLOWED = 0.5
# Alarms that the healthy training of the same seed has this near are no sign of the fault.
SAME = 20
UPDATES = ("qk_update", "qk_update_second_order")
CLAIMED = ("effective_rank_energy", "effective_rank", "stable_rank")
RIVALS = ("loss", "gradient_norm", "activation_kurtosis")
# Of the defaults, those that are among the columns of their quantity too.
TWICE = tuple(f"{DEFAULT}, {condition}" for condition in ("departure", "spike", "cusum"))


@dataclass(frozen=True)
class Study:
    """Outcomes of all trainings on some seeds, by what they are.

    Attributes:
        outcomes: Of each case one per seed, in the same order.
        costs: Milliseconds of a sample by monitor, at its cheapest.
    """

    outcomes: Mapping[str, Sequence[Outcome]]
    costs: Mapping[str, float]

    @property
    def faulty(self) -> list[Case]:
        """Those in which something is meant to go wrong."""
        return [case for case in CASES if not case.is_healthy and case.what in self.outcomes]

    @property
    def healthy_steps(self) -> int:
        """Of all healthy trainings."""
        return sum(case.steps * len(self.outcomes[case.what]) for case in CASES if case.is_healthy)

    def rules(self) -> list[str]:
        """Names of all rules that judged anything."""
        return list(dict.fromkeys(name for all_ in self.outcomes.values() for one in all_ for name in one.alarms))

    def false_alarms(self, names: Iterable[str]) -> float:
        """In a thousand healthy steps, of some rules together."""
        known = [(case, one) for case in CASES if case.is_healthy for one in self.outcomes[case.what]]
        steps = sum(case.steps for case, _ in known)
        return 1000 * sum(len(one.alarms.get(name, ())) for _, one in known for name in names) / steps

    def seen(self, case: Case, names: Sequence[str]) -> list[int | None]:
        """Step of the first alarm of some rules in each training, that its healthy twin does not have."""
        twins = {twin.seed: twin for twin in self.outcomes[case.healthy]}
        found = []
        for one in self.outcomes[case.what]:
            alarms = {
                name: [s for s in one.alarms.get(name, ()) if not _near(s, twins[one.seed].alarms.get(name, ()))]
                for name in names
            }
            found.append(first(Outcome(one.seed, None, None, alarms, {}), names, begin(case)))
        return found


def _near(step: int, others: Iterable[int]) -> bool:
    return any(abs(step - other) <= SAME for other in others)


def harms(study: Study, case: Case) -> bool:
    """Whether most of the trainings were harmed, or show it."""
    outcomes = study.outcomes[case.what]
    return 2 * sum(one.shown is not None or one.harmed is not None for one in outcomes) > len(outcomes)


def is_quiet(study: Study, name: str) -> bool:
    """Whether a rule has no false alarm; nor, of a departure, at half its threshold."""
    level = level_of(name)
    if level == PROBE:
        return False
    looser = [] if math.isnan(level) else [name.replace(f"departure {level:g}", f"departure {level / 2:g}")]
    return study.false_alarms([name, *looser]) == 0


def chosen(study: Study) -> list[str]:
    """For each fault that harms the earliest rule that foresees it in all trainings: of those that are quiet on these
    seeds; where none of them does, of those with which all together stay within the false alarms that are allowed.
    """
    faults = [case for case in study.faulty if harms(study, case)]
    rules = _judged(study)
    quiet = [name for name in rules if is_quiet(study, name)]
    found: list[str] = []
    for case in faults:
        found += _earliest(study, case, quiet, found)
    for case in faults:
        if not _earliest(study, case, found, found):
            affordable = [name for name in rules if study.false_alarms([*found, name]) <= ALLOWED]
            found += _earliest(study, case, affordable, found)
    return list(dict.fromkeys(found))


def _judged(study: Study) -> list[str]:
    """Names of all rules that are for use, each once."""
    return [name for name in study.rules() if level_of(name) != PROBE and not name.endswith(TWICE)]


def _earliest(study: Study, case: Case, names: Sequence[str], found: Sequence[str]) -> list[str]:
    """The first rule to foresee a fault, if any does; of two that are as early the one that was found before."""
    delays = {name: study.seen(case, [name]) for name in names}
    ends = [math.inf if one.shown is None else one.shown for one in study.outcomes[case.what]]
    known = {
        name: median(at for at in steps if at is not None)
        for name, steps in delays.items()
        if all(at is not None and at <= end for at, end in zip(steps, ends, strict=True))
    }
    return [min(known, key=lambda name: (known[name], name not in found))] if known else []


def lead(study: Study, case: Case, names: Sequence[str]) -> str:
    """Steps from the first alarm to the loss, where that shows anything; else `@` and steps since the fault began."""
    seen, outcomes = study.seen(case, names), study.outcomes[case.what]
    pairs = [(one.shown, at) for one, at in zip(outcomes, seen, strict=True) if at is not None]
    if not pairs:
        return ""
    shown = [s - at for s, at in pairs if s is not None]
    numbers = shown if len(shown) == len(pairs) else [at - begin(case) for _, at in pairs]
    missed = f", {len(seen) - len(pairs)} missed" if len(pairs) < len(seen) else ""
    words = f"{median(numbers):+.0f}" if len(shown) == len(pairs) else f"@{median(numbers):.0f}"
    return words + (f" ({min(numbers)} to {max(numbers)})" if len(numbers) > 1 else "") + missed


def ahead(outcomes: Sequence[Outcome], seen: Sequence[int | None], what: str) -> str:
    """Steps from an alarm to what is seen from outside."""
    pairs = [(getattr(one, what), at) for one, at in zip(outcomes, seen, strict=True)]
    numbers = [shown - at for shown, at in pairs if shown is not None and at is not None]
    return f"{median(numbers):+.0f} ({min(numbers)} to {max(numbers)})" if numbers else "never"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_faults(study: Study, names: Sequence[str]) -> str:
    """What the loss, the held-out loss and some rules say of each fault."""
    rows = []
    for case in study.faulty:
        outcomes, seen = study.outcomes[case.what], study.seen(case, names)
        sides = [[getattr(one, side) for one in outcomes] for side in ("shown", "harmed")]
        steps = [", ".join("never" if s is None else str(s - begin(case)) for s in side) for side in sides]
        by = min(names, key=lambda name: _middle(study.seen(case, [name])), default="")
        alarmed = ", ".join("never" if s is None else str(s - begin(case)) for s in seen)
        leads = [ahead(outcomes, seen, side) for side in ("shown", "harmed")]
        rows.append([case.what, *steps, alarmed, *leads, f"`{by}`" if any(s is not None for s in seen) else "nothing"])
    headings = ["fault", "loss shows it after", "held-out harm after", "first alarm after"]
    return table([*headings, "before the loss", "before the harm", "the earliest"], rows)


def _middle(steps: Sequence[int | None]) -> float:
    return median(math.inf if step is None else step for step in steps)


def of_columns(choice: Study, report: Study) -> str:
    """Each quantity's best rule of those that were quiet on the seeds that rules were chosen on, on the others."""
    rows = []
    for quantity in dict.fromkeys(map(quantity_of, report.rules())):
        own = [name for name in _judged(report) if quantity_of(name) == quantity]
        if quantity in RIVALS or not own:
            continue
        best = min(own, key=lambda name: (choice.false_alarms([name]), _total(choice, name)))
        cells = [lead(report, case, [best]) for case in report.faulty]
        if any(cells):
            word = best.split(": ")[1]
            rows.append([f"`{quantity}`", word, *cells, f"{report.false_alarms([best]):.2f}"])
    return table(["quantity", "rule", *(case.what for case in report.faulty), "false"], rows)


def of_rivals(report: Study) -> str:
    """Loss, gradient norm and kurtosis."""
    names = [name for name in _judged(report) if quantity_of(name) in RIVALS]
    rows = [
        [name, *(lead(report, c, [name]) for c in report.faulty), f"{report.false_alarms([name]):.2f}"]
        for name in names
    ]
    return table(["rule", *(case.what for case in report.faulty), "false"], rows)


def _total(study: Study, name: str) -> float:
    """Delays of a rule, over all faults that harm."""
    cases = [case for case in study.faulty if harms(study, case)]
    return sum(min(_middle(study.seen(case, [name])), 10.0 * case.steps) for case in cases)


def of_departures(study: Study) -> str:
    """False alarms in a thousand samples, over quantities."""
    known = [(case, one) for case in CASES if case.is_healthy for one in study.outcomes[case.what]]
    rows = []
    for level in LEVELS:
        for where in ("any site", "half of the sites", ""):
            rates = []
            for name in study.rules():
                if level_of(name) == level and name.endswith(f"departure {level:g} {where}".strip()):
                    of_rule = [one for _, one in known if name in one.alarms]
                    samples = sum(one.samples[quantity_of(name)] for one in of_rule)
                    rates += [1000 * sum(len(one.alarms[name]) for one in of_rule) / samples] if samples else []
            figures = [f"{np.mean(rates):.2f}", f"{np.median(rates):.2f}", f"{np.quantile(rates, 0.9):.2f}"]
            silent = f"{100 * np.mean(np.array(rates) == 0):.0f} %"
            rows.append([f"{level:g}", where or "the whole model", str(len(rates)), *figures, silent])
    return table(["spreads", "at", "quantities", "mean", "median", "90th percentile", "without any"], rows)


def of_claims(study: Study) -> Iterator[str]:
    """What is claimed of D2, D3 and dW, and of stable ranks, in counts."""
    cases = [case for case in study.faulty if case.healthy == "GPT"]
    names = {
        what: [name for name in study.rules() if quantity_of(name) in quantities and name.endswith(MEDIAN)]
        for what, quantities in {
            "D2": [f"{UPDATES[0]}_{rank}" for rank in CLAIMED],
            "D3": [f"{UPDATES[1]}_{rank}" for rank in CLAIMED],
            "dW": ["update_effective_rank", "update_stable_rank"],
            "The stable rank of weights": ["weight_stable_rank"],
        }.items()
    }
    runs = [(case, i) for case in cases for i in range(len(study.outcomes[case.what]))]
    at = {what: [study.seen(case, of)[i] or math.inf for case, i in runs] for what, of in names.items()}
    loss = [study.outcomes[case.what][i].shown or math.inf for case, i in runs]
    if names["D2"]:
        order = sum(a < b < c < d for a, b, c, d in zip(at["D2"], at["D3"], at["dW"], loss, strict=True))
        of = f"{order} of {len(runs)} trainings of the GPT with a fault"
        yield f"- D2, D3, dW and the loss change in this order in {of}."
        for one, other in (("D2", "D3"), ("D2", "dW")):
            pairs = list(zip(at[one], at[other], strict=True))
            before, after = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
            yield f"- {one} changes before {other} in {before} of them, and after it in {after}."
    else:
        yield "- D2 and D3 were not measured: the trainings were recorded without `AttentionMonitor`."
    for what, steps in at.items():
        before = sum(a < b for a, b in zip(steps, loss, strict=True) if b < math.inf)
        alarmed = sum(a < math.inf for a in steps)
        shown = sum(b < math.inf for b in loss)
        yield (
            f"- {what} leaves its healthy baseline in {alarmed} of {len(runs)}. "
            f"It does so before the loss in {before} of the {shown} in which the loss shows the fault."
        )


def page(choice: Study, report: Study, rules: Sequence[str]) -> str:
    """All tables."""
    seeds = [sorted({one.seed for all_ in study.outcomes.values() for one in all_}) for study in (choice, report)]
    defaults = [name for name in report.rules() if name.split(": ")[1].startswith(DEFAULT)]
    unseen = [case.what for case in report.faulty if harms(report, case) and not _foreseen(report, case)]
    return "\n\n".join(
        [
            f"Rules were chosen on {_seeds(seeds[0])}. Unless a heading says otherwise, "
            f"the tables show {_seeds(seeds[1])}, with {report.healthy_steps:,} healthy steps.",
            "### Faults, and all defaults together",
            of_faults(report, defaults),
            _with_false_alarms(report, f"All {len(defaults)} defaults", defaults),
            "### The chosen rules alone",
            of_faults(report, rules),
            _with_false_alarms(report, f"The {len(rules)} chosen rules", rules),
            f"No quiet rule foresees these faults: {'; '.join(unseen) or 'none'}.",
            "### The chosen rules on the seed on which they were chosen",
            of_faults(choice, rules),
            "### Rivals",
            of_rivals(report),
            "### Every quantity",
            of_columns(choice, report),
            "### False alarms of departures, in a thousand healthy samples",
            of_departures(report),
            "### Published claims",
            "\n".join(of_claims(report)),
            "### Cost",
            table(["monitor", "ms a sample"], [[f"`{name}`", f"{ms:.0f}"] for name, ms in report.costs.items()]),
        ]
    )


def _with_false_alarms(study: Study, what: str, names: Sequence[str]) -> str:
    """Rules, and how often they are wrong."""
    told = [f"- `{name}`" + (f" ({rate:.2f})" if (rate := study.false_alarms([name])) else "") for name in names]
    together = f"{what} together have {study.false_alarms(names):.2f} false alarms in a thousand healthy steps"
    return "\n".join(
        [f"{together} ({ALLOWED} allowed). Brackets give those of a single rule, if there are any:\n", *told]
    )


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds[:-1]))} and {seeds[-1]}"


def _foreseen(study: Study, case: Case) -> bool:
    """Whether a rule that is quiet in health says something before the loss does, or at all where that does not."""
    rules = [name for name in study.rules() if level_of(name) != PROBE and study.false_alarms([name]) == 0]
    ends = [math.inf if one.shown is None else one.shown for one in study.outcomes[case.what]]
    return any(
        at is not None and at < end for rule in rules for at, end in zip(study.seen(case, [rule]), ends, strict=True)
    )
