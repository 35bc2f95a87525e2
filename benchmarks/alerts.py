"""What a warning is worth: how long before a fault shows it comes, what it misses, how often it is wrong.

    python -m benchmarks.alerts

Trainings with faults and healthy ones, watched by all monitors, each recorded once to `runs/alerts`; there a later run
finds them, so that rules are judged again without training. Writes the tables of `docs/evidence/warnings.md`.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.faults.judging import Outcome, alarms, harm, samples, shows, spreads_out
from benchmarks.faults.page import Study, chosen, page
from benchmarks.faults.recording import cost, load
from benchmarks.faults.trainings import CASES, Case

PAGE = Path(__file__).parent.parent / "docs" / "evidence" / "warnings.md"
TABLES = "<!-- What follows is written by python -m benchmarks.alerts -->"
CHOICE, REPORT = (0,), (10, 11, 12)


@dataclass(frozen=True)
class Judged:
    """One training: alarms of all rules, numbers of samples, cost of a sample, and what was seen from outside."""

    alarms: dict[str, list[int]]
    samples: dict[str, int]
    cost: dict[str, float]
    outside: dict[str, dict[int, float]]


def judged(folder: Path, training: tuple[int, int]) -> Judged:
    """One training, which is recorded if it was not before."""
    index, seed = training
    curves = load(CASES[index], seed, folder)
    outside = {name: curve for name, curve in curves.items() if name in ("loss", "held_out", "spread")}
    return Judged(alarms(curves), samples(curves), cost(curves), outside)


def outcome(seed: int, one: Judged, twin: Judged, healthy: Sequence[Judged]) -> Outcome:
    """Of a training, beside the healthy one of its seed and all healthy ones."""
    loss, spread = one.outside["loss"], one.outside.get("spread")
    shown = spreads_out(spread) if spread else shows(loss, [other.outside["loss"] for other in healthy])
    harmed = harm(one.outside["held_out"], twin.outside["held_out"]) if "held_out" in one.outside else None
    return Outcome(seed, shown, harmed, one.alarms, one.samples)


def studies(folder: Path, workers: int, *groups: Sequence[int]) -> list[Study]:
    """All trainings on some seeds, for each group of seeds; what is healthy is known from all of them."""
    trainings = [(index, seed) for seeds in groups for seed in seeds for index in range(len(CASES))]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        found = dict(zip(trainings, pool.map(partial(judged, folder), trainings), strict=True))
    of = {case.what: {seed: one for (i, seed), one in found.items() if CASES[i] is case} for case in CASES}
    costs = dict[str, float]()
    for one in found.values():
        costs |= {name: min(ms, costs.get(name, ms)) for name, ms in one.cost.items()}

    def outcomes(case: Case, seeds: Sequence[int]) -> list[Outcome]:
        healthy = of[case.healthy]
        return [outcome(seed, of[case.what][seed], healthy[seed], list(healthy.values())) for seed in seeds]

    return [Study({case.what: outcomes(case, seeds) for case in CASES}, costs) for seeds in groups]


def written(folder: Path, workers: int) -> tuple[Study, list[str]]:
    """Record what is not recorded yet, judge, write the page; the trainings that it reports, and the chosen rules."""
    choice, report = studies(folder, workers, CHOICE, REPORT)
    rules = chosen(choice)
    by_hand = PAGE.read_text().split(TABLES)[0]
    PAGE.write_text(f"{by_hand}{TABLES}\n\n{page(choice, report, rules)}\n")
    return report, rules


def main(folder: Path = Path("runs/alerts"), workers: int = 2) -> None:
    """Write the page.

    Args:
        folder: Of the records.
        workers: Processes, of one thread each.
    """
    written(folder, workers)


if __name__ == "__main__":
    auto_cli(main)
