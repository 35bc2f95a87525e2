"""The curves of a run as rules want them, and what they say of it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lightning_lowrank.tensorboard.diagnosing.judging import HELD_OUT, LASTING, LOSS, Finding, diagnose, judge
from lightning_lowrank.tensorboard.diagnosing.rules import RULES
from lightning_lowrank.tensorboard.series import Reader, Table

# What users call the loss of a step, where no `LossMonitor` has logged it.
LOSSES = ("loss", "train_loss", "train/loss", "loss_step", "train_loss_step", "training_loss")
HELD_OUT_LOSSES = ("val_loss", "val/loss", "valid_loss", "validation_loss", "validation/loss", "eval_loss", "eval/loss")


class RunCurves(Mapping[str, Table]):
    """Every quantity of a run and its losses, each read when it is asked for.

    Args:
        reader: Of the experiment.
        run: Its name.
        series: What the run has.
    """

    def __init__(self, reader: Reader, run: str, series: Mapping[tuple[str, str], Any]) -> None:
        self._reader, self._run = reader, run
        self._parts = {name: parts for (kind, name), parts in series.items() if kind == "vector"}
        self._read: dict[str, Table] = {}
        own = min((name for name in self._parts if name.endswith(LOSS)), key=len, default=LOSS)
        loss = loss_of(self[own] if own in self._parts else None, reader.scalar(run, LOSSES))
        self._read |= {} if loss is None else {own: loss}
        held_out = reader.scalar(run, HELD_OUT_LOSSES)
        self._read |= {} if held_out is None else {HELD_OUT: held_out}

    def __getitem__(self, name: str) -> Table:
        if name not in self._read:
            self._read[name] = self._reader.table(self._run, self._parts[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._parts, **self._read})

    def __len__(self) -> int:
        return len({**self._parts, **self._read})


def loss_of(own: Table | None, logged: Table | None) -> Table | None:
    """The loss of a run: from `LossMonitor`, or as the user logged it if that has more samples.

    Loggers begin late, so they miss the start of a loss that explodes at once. Earlier samples of `LossMonitor` are
    therefore added in front if both are the same loss.
    """
    if own is None or logged is None or len(own.steps) >= len(logged.steps):
        return logged if own is None else own
    if not _are_one(own, logged):
        return own if len(own.steps) >= LASTING else logged
    early = own.steps < logged.steps[0]
    steps, values = ((one[early], two) for one, two in ((own.steps, logged.steps), (own.values, logged.values)))
    return Table(np.concatenate([*steps]), logged.sites, np.concatenate([*values]))


def _are_one(own: Table, logged: Table) -> bool:
    """Whether two curves are within a factor of 2, in the median of the steps that both have been at."""
    common = (own.steps >= logged.steps[0]) & (own.steps <= logged.steps[-1])
    if not common.any():
        return False
    beside = np.interp(own.steps[common], logged.steps, logged.values[:, 0])
    with np.errstate(all="ignore"):
        return bool(0.5 < np.median(own.values[common, 0] / beside) < 2)


def findings_of(reader: Reader, run: str, series: Mapping[tuple[str, str], Any]) -> tuple[list[Finding], list[str]]:
    """What the rules say of a run, and the names of those that have nothing to look at,
    with who measures it.
    """
    curves = RunCurves(reader, run, series)
    idle = [
        f"{rule.name} ({rule.monitor})"
        for rule in RULES
        if any(judge(condition, curves) is None for condition in rule.conditions)
    ]
    return diagnose(curves, RULES), idle
