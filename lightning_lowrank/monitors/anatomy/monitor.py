"""`GradientAnatomyMonitor`."""

from collections.abc import Sequence
from typing import Literal

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.monitors.anatomy.alerts import PhaseShiftAlert
from lightning_lowrank.monitors.anatomy.source import Anatomy
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class GradientAnatomyMonitor(Monitor):
    """Where each layer's gradient comes from (residue of the loss or spike of the inputs), which factor limits its
    rank, and how stable it is.

    On steps with a sample, the monitor records inputs of linear layers and convolutions, and the gradients of their
    outputs. It keeps the same rows of both. Their product is compared with the gradient that the optimizer gets.

    Memory on steps with a sample: for each layer, `max_rows` rows of inputs and output gradients, 8 numbers per row of
    the batch, and a copy of the gradient. The backward pass needs slightly more. Between samples two directions per
    layer are kept, also in checkpoints.

    Args:
        match: Weights to watch: globs, `re:REGEX`, `type:LAYERCLASS`; by default those of all linear layers and
            convolutions without groups.
        every_n_steps: Cadence in optimizer steps; default 1000.
        max_rows: Number of rows that are kept for each layer.
        num_outputs: Number of outputs of the model, at most 10. As many directions of the output gradients count as
            directions of the residue. By default the width of the module's last linear layer.
        exclude: Patterns of what to leave out, as for `match`.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single weights: `True`, `False`, or "auto". "auto" writes all from "standard" on if these
            are at most 100; otherwise the four shares, the gradient's stable rank, `alignment` and `deviation` of up to
            14 weights.
        seed: Seed for the choice of rows and for random vectors.
        name: Prefix of all tags.
        alerts: Alert rules; "default" reports, without a warning, when a layer changes from residue to spike.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of range; when training starts: a pattern matches nothing, or a layer cannot be
            measured.

    Examples:
        >>> GradientAnatomyMonitor().recorders[0].quantities[1:5]
        ['anatomy_residue', 'anatomy_interpolant', 'anatomy_spike', 'anatomy_bulk']
    """

    word = "anatomy"

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """A layer changes from residue to spike: an event, not a warning."""
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
