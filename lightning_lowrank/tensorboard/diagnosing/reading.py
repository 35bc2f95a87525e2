"""The curves of a run as rules want them, and what they say of it."""

from collections.abc import Mapping
from typing import Any

from lightning_lowrank.tensorboard.diagnosing.judging import Finding, diagnose, judge
from lightning_lowrank.tensorboard.diagnosing.rules import RULES
from lightning_lowrank.tensorboard.series import Reader, Table

# What users call the loss of a step, where no `LossMonitor` has logged it.
LOSS = "step_loss"
LOSSES = ("loss", "train_loss", "train/loss", "loss_step", "train_loss_step", "training_loss")


def curves_of(reader: Reader, run: str, series: Mapping[tuple[str, str], Any]) -> dict[str, Table]:
    """Every quantity of a run, and its loss."""
    found = {name: reader.table(run, parts) for (kind, name), parts in series.items() if kind == "vector"}
    if not any(name.endswith(LOSS) for name in found):
        loss = reader.scalar(run, LOSSES)
        found |= {} if loss is None else {LOSS: loss}
    return {name: table for name, table in found.items() if len(table.steps)}


def findings_of(reader: Reader, run: str, series: Mapping[tuple[str, str], Any]) -> tuple[list[Finding], list[str]]:
    """What the rules say of a run, and the names of those that have nothing to look at."""
    curves = curves_of(reader, run, series)
    idle = [rule.name for rule in RULES if any(judge(condition, curves) is None for condition in rule.conditions)]
    return diagnose(curves, RULES), idle
