"""What `lightning-lowrank diagnose` is worth: false lines in healthy trainings, and causes that it names first.

    python -m benchmarks.diagnose

The trainings of `benchmarks.alerts`, whose records it takes where they are, and three that are wrong from the start.
Rules were chosen on seed 0 and are reported on others. Writes the tables of `docs/evidence/diagnose.md`.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.diagnoses.planted import PLANTED
from benchmarks.diagnoses.reading import tables
from benchmarks.faults.page import table
from benchmarks.faults.recording import load
from benchmarks.faults.trainings import CASES, Case
from lightning_lowrank.tensorboard.diagnosing.judging import Finding, diagnose
from lightning_lowrank.tensorboard.diagnosing.rules import RULES

PAGE = Path(__file__).parent.parent / "docs" / "evidence" / "diagnose.md"
TABLES = "<!-- What follows is written by python -m benchmarks.diagnose -->"
CHOICE, REPORT = (0,), (10, 11, 12)
TRAININGS = [*CASES, *PLANTED]
# What rules look at; `RankMonitor(["features"])` is one of them.
READ = {rule.monitor.partition("(")[0] for rule in RULES}
# The rule whose cause is what was planted.
NAMED = {
    "GPT, rate ramp": "weights-outgrow",
    "GPT, normalisation off": "sudden-change",
    "GPT, attention logits grow": "attention-collapse",
    "GPT, optimizer state corrupted": "update-outlier",
    "GPT, labels corrupted": "loss-rises",
    "GPT, half precision overflows": "diverged",
    "GPT, data shard stuck": "overfits",
    "experts, one dead": "idle-experts",
    "unnormalised, rate grows": "weights-outgrow",
    "deep MLP, rate grows": "weights-outgrow",
    "SimSiam, no stop-gradient": "feature-collapse",
    "digits MLP, label noise": "label-noise",
    "digits MLP, rate too small": "does-not-learn",
    "digits MLP, dead ReLU": "dead-units",
}


@dataclass(frozen=True)
class Said:
    """Of one training."""

    case: Case
    seed: int
    findings: Sequence[Finding]

    @property
    def is_named(self) -> bool:
        """Whether what was planted is named first."""
        return bool(self.findings) and self.findings[0].rule == NAMED[self.case.what]


def said(folder: Path, training: tuple[int, int]) -> tuple[int, int, list[Finding]]:
    """What the rules say of a training, which is recorded if it was not before."""
    index, seed = training
    return index, seed, diagnose(tables(load(TRAININGS[index], seed, folder, READ)), RULES)


def page(all_: Sequence[Said]) -> str:
    """The tables."""
    chosen, reported = ([one for one in all_ if one.seed in seeds] for seeds in (CHOICE, REPORT))
    return "\n\n".join(
        [
            f"### Seeds on which no rule was chosen: {', '.join(map(str, REPORT))}",
            *_tables(reported),
            f"### The seed on which rules were chosen: {', '.join(map(str, CHOICE))}",
            *_tables(chosen),
        ]
    )


def _tables(all_: Sequence[Said]) -> Iterator[str]:
    healthy, failing = ([one for one in all_ if one.case.is_healthy is is_healthy] for is_healthy in (True, False))
    false = [len(one.findings) for one in healthy]
    named = sum(one.is_named for one in failing)
    share = f"{named} of {len(failing)} failing ones ({100 * named / len(failing):.0f} %)"
    yield (
        f"{len(healthy)} healthy trainings have {sum(false)} false lines, at most {max(false, default=0)} in one. "
        f"The planted fault is named first in {share}."
    )
    rows = []
    for case in dict.fromkeys(one.case for one in failing):
        of_case = [one for one in failing if one.case is case]
        lines = "<br>".join(dict.fromkeys(_words(one) for one in of_case))
        rows.append(
            [case.what, NAMED[case.what] or "no rule", f"{sum(o.is_named for o in of_case)} of {len(of_case)}", lines]
        )
    yield table(["planted", "rule", "named first", "lines, worst first (since step)"], rows)


def _words(one: Said) -> str:
    return ", ".join(f"{finding.rule} ({finding.since})" for finding in one.findings) or "nothing"


def judged(folder: Path, workers: int) -> list[Said]:
    """All trainings on all seeds."""
    asked = [(index, seed) for seed in (*CHOICE, *REPORT) for index in range(len(TRAININGS))]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return [Said(TRAININGS[i], seed, found) for i, seed, found in pool.map(partial(said, folder), asked)]


def main(folder: Path = Path("runs/alerts"), workers: int = 2) -> None:
    """Write the page.

    Args:
        folder: Of the records.
        workers: Processes, of one thread each.
    """
    by_hand = PAGE.read_text().split(TABLES)[0]
    PAGE.write_text(f"{by_hand}{TABLES}\n\n{page(judged(folder, workers))}\n")


if __name__ == "__main__":
    auto_cli(main)
