"""`GradientAnatomyMonitor`."""

from collections.abc import Sequence
from typing import Literal

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.monitors.anatomy.alerts import PhaseShiftAlert
from lightning_lowrank.monitors.anatomy.source import Anatomy
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class GradientAnatomyMonitor(Monitor):
    """Where each layer's gradient comes from: residue or spike of the inputs, which side limits its rank, and how
    stable it is.

    On due steps the inputs of linear layers and convolutions are heard, and the gradients of their outputs; of both the
    same rows are kept. Their product is held against the gradient that the optimizer is given.

    Memory on due steps: of each layer `max_rows` rows of inputs and of signals, a little more until the backward pass
    is over, 8 numbers for every row that there was, and a copy of the gradient. Two directions per layer stay, and are
    in the checkpoint.

    Args:
        match: Weights to watch: globs, `re:REGEX`, `type:LAYERCLASS`; of all linear layers and convolutions without
            groups unless given.
        every_n_steps: Cadence, in optimizer steps; 1000 unless given.
        max_rows: Rows that are kept of each layer.
        num_outputs: Of the model, at most 10: as many directions of the signals are the residue's. The width of the
            module's last linear layer unless given.
        exclude: As `match`, taken away.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single weights: `True`, `False`, or "auto": from "standard" on, all if they are at
            most 100, else the four shares, the gradient's stable rank, `alignment` and `deviation` of up to 14 weights.
        seed: Of the rows and probes.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; "default" tells, without a warning, when a layer goes from residue to
            spike.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of its range; when training starts: a pattern fits nothing, or a layer that cannot
            be heard.

    Examples:
        >>> GradientAnatomyMonitor().recorders[0].quantities[1:5]
        ['anatomy_residue', 'anatomy_interpolant', 'anatomy_spike', 'anatomy_bulk']
    """

    word = "anatomy"

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """A layer goes from residue to spike: an event, not a warning."""
        return [PhaseShiftAlert()]

    def __init__(
        self,
        match: str | Sequence[str] | None = None,
        every_n_steps: int | None = None,
        max_rows: int = 2048,
        num_outputs: int | None = None,
        exclude: str | Sequence[str] | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        seed: int = 0,
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = "default",
        max_overhead: float | None = None,
    ) -> None:
        source = Anatomy(match=match, exclude=exclude, max_rows=max_rows, num_outputs=num_outputs)
        schedule = cadence(every_n_steps, max_overhead, 1000)
        super().__init__(
            probe_of(source, schedule), detail=detail, per_site=per_site, seed=seed, alerts=alerts, name=name
        )
