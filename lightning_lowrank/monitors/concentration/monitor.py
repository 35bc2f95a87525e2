"""`ConcentrationMonitor`."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.monitors.concentration.source import Concentration
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class ConcentrationMonitor(Monitor):
    """Who carries the learning: how unequally gradient, update and importance are distributed over modules, attention
    heads and neurons.

    Each number comes with its value at the start of training. Importance is the exact gradient of the loss with respect
    to a gate on a head or a neuron. It is computed from the weight that reads the unit and from that weight's gradient,
    without hooks or a second pass. The monitor also compares masks of the largest weights: they show whether the
    subnetwork to which the model would be pruned (the lottery ticket) still changes.

    Args:
        units: Any of `module`, `head`, `neuron`, `direction` (singular directions of all matrices; needs an
            eigensolver). By default the first three, if the model has them.
        signals: Any of `gradient` and `update` (energy per entry) and `gate` (importance, of heads and neurons).
        every_n_steps: Cadence in optimizer steps; default 200.
        match: Parameters to watch: globs, `re:REGEX`, `type:LAYERCLASS`; all by default. Frozen ones are left out.
        exclude: Patterns of what to leave out, as for `match`.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of the importance of single heads: `True`, `False`, or "auto" (from "standard" on, if there are
            at most 100).
        seed: Seed for the choice of weights in masks, for models with more than 262,144 weights.
        name: Prefix of all tags.
        alerts: Alert rules; none by default. `EarlyBirdAlert()` reports when the mask has settled.
        densities: Shares of the weights that the masks keep; an empty list for no masks.
        heads: Number of heads by pattern of layer, `{"*.attn.out": 8}`, for output projections of attention that are
            not found.
        neurons: Patterns of layers whose inputs are neurons, if the automatic search finds the wrong ones.
        reference: Checkpoint of another run with this monitor, to compare which heads and neurons matter.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is unknown or out of range, or the reference cannot be read. When training starts: a
            pattern matches nothing, the model has no units of a requested kind, the reference belongs to another model,
            or parameters are sharded.

    Examples:
        >>> ConcentrationMonitor(units=["head"], signals=["gate"]).recorders[0].quantities[1:4]
        ['concentration_head_gate_gini', 'concentration_head_gate_gini_start', 'concentration_head_gate_top_share']
    """

    word = "concentration"

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """None."""
        return []

    def __init__(
        self,
        units: Sequence[str] | None = None,
        signals: Sequence[str] = ("gradient", "update", "gate"),
        every_n_steps: int | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        seed: int = 0,
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = "default",
        densities: Sequence[float] = (0.1, 0.5),
        heads: Mapping[str, int] | None = None,
        neurons: str | Sequence[str] | None = None,
        reference: str | PathLike[str] | None = None,
        max_overhead: float | None = None,
    ) -> None:
        chosen: dict[str, Any] = {
            "match": match,
            "exclude": exclude,
            "densities": densities,
            "heads": heads,
            "neurons": neurons,
            "seed": seed,
        }
        source = Concentration(units, signals, reference=reference, **chosen)
        schedule = cadence(every_n_steps, max_overhead, 200)
        super().__init__(
            probe_of(source, schedule), detail=detail, per_site=per_site, seed=seed, alerts=alerts, name=name
        )
