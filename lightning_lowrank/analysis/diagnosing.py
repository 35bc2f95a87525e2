"""`lightning-lowrank diagnose`: what an expert would say about a run."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from lightning_lowrank.analysis.page import reader_of
from lightning_lowrank.analysis.showing import print_json
from lightning_lowrank.tensorboard.diagnosing.judging import SEVERITIES, Finding
from lightning_lowrank.tensorboard.diagnosing.reading import findings_of
from lightning_lowrank.tensorboard.diagnosing.rules import RULES

# Of each run.
LINES = 12
# What to do where nothing was measured, for a run with `watch_all` too.
LEFT_OUT = "watch_all() includes what its budget and the model allow; add a monitor that it left out by hand"


def diagnose(
    runs: list[str], *, json: bool = False, fail_on: Literal["critical", "warning", "info", "never"] = "never"
) -> None:
    """Print what is wrong in runs, worst first, in at most twelve lines for each run.

    Args:
        runs: Folders with event files; each may contain one run or several.
        json: Print a list of findings by run.
        fail_on: Exit with 1 if there is a finding as bad as this.

    Raises:
        ValueError: There are no event files.
    """
    found: dict[str, tuple[list[Finding], dict[str, str]]] = {}
    for folder in runs:
        reader = reader_of(Path(folder))
        for name, series in reader.runs().items():
            found[folder if name == "." else f"{folder.rstrip('/')}/{name}"] = findings_of(reader, name, series)
    if json:
        print_json({run: [finding.plain() for finding in findings] for run, (findings, _) in found.items()})
    else:
        told = [line for run, (findings, idle) in found.items() for line in lines_of(run, findings, len(idle))]
        sys.stdout.write("".join(f"{line}\n" for line in [*told, *unchecked([idle for _, idle in found.values()])]))
    bad = SEVERITIES[: SEVERITIES.index(fail_on) + 1] if fail_on != "never" else ()
    if any(finding.severity in bad for findings, _ in found.values() for finding in findings):
        sys.exit(1)


def lines_of(run: str, findings: Sequence[Finding], num_idle: int) -> list[str]:
    """A heading, and a line for each finding."""
    checked = len(RULES) + 1 - num_idle
    heading = f"{run}: {len(findings)} of {checked} rules reported something"
    if not findings:
        heading = f"{run}: nothing to report, {checked} rules were checked"
    told = [f"{finding.severity:8} {finding.rule}: {finding.message}" for finding in findings]
    return (
        [heading, *told]
        if len(told) < LINES
        else [heading, *told[: LINES - 2], f"and {len(told) - LINES + 2} more: --json"]
    )


def unchecked(idle: Sequence[Mapping[str, str]]) -> list[str]:
    """The rules that were not checked in any run, by what has to be measured for them."""
    needs: dict[str, list[str]] = {}
    for rule, monitor in (idle[0] if idle else {}).items():
        if all(rule in others for others in idle):
            needs.setdefault(monitor, []).append(rule)
    told = "; ".join(f"{', '.join(rules)} (needs {monitor})" for monitor, rules in needs.items())
    return [f"not checked, because nothing was measured for them: {told}. {LEFT_OUT}"] if told else []
