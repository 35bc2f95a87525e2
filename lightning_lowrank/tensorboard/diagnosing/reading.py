"""The curves of a run as rules want them, and what they say of it."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_lowrank.tensorboard.diagnosing.judging import LOSS, Finding, diagnose, judge
from lightning_lowrank.tensorboard.diagnosing.rules import RULES
from lightning_lowrank.tensorboard.series import Reader, Table

# What users call the loss of a step, where no `LossMonitor` has logged it.
LOSSES = ("loss", "train_loss", "train/loss", "loss_step", "train_loss_step", "training_loss")


class RunCurves(Mapping[str, Table]):
    """Every quantity of a run and its loss, each read when it is asked for.

    Args:
        reader: Of the experiment.
        run: Its name.
        series: What the run has.
    """

    def __init__(self, reader: Reader, run: str, series: Mapping[tuple[str, str], Any]) -> None:
        self._reader, self._run = reader, run
        self._parts = {name: parts for (kind, name), parts in series.items() if kind == "vector"}
        self._read: dict[str, Table] = {}
        if not any(name.endswith(LOSS) for name in self._parts):
            loss = reader.scalar(run, LOSSES)
            self._read |= {} if loss is None else {LOSS: loss}

    def __getitem__(self, name: str) -> Table:
        if name not in self._read:
            self._read[name] = self._reader.table(self._run, self._parts[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._parts, **self._read})

    def __len__(self) -> int:
        return len({**self._parts, **self._read})


def findings_of(reader: Reader, run: str, series: Mapping[tuple[str, str], Any]) -> tuple[list[Finding], list[str]]:
    """What the rules say of a run, and the names of those that have nothing to look at."""
    curves = RunCurves(reader, run, series)
    idle = [rule.name for rule in RULES if any(judge(condition, curves) is None for condition in rule.conditions)]
    return diagnose(curves, RULES), idle
