"""`ConcentrationMonitor`."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.monitors.concentration.source import Concentration
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class ConcentrationMonitor(Monitor):
    """Who carries the learning: how unequally modules, attention heads and neurons share gradient, update and
    importance.

    Beside each number stands what it was at the start of training. Importance is the exact gradient of the loss by a
    gate on a head or a neuron, from the weight that reads it and that weight's gradient: no hooks, no second pass. Also
    masks of the largest weights: whether the ticket that the training would be pruned to still changes.

    Args:
        units: Any of `module`, `head`, `neuron`, `direction` (singular directions of all matrices; takes an
            eigensolver). Unless given, the first three, as far as the model has them.
        signals: Any of `gradient` and `update` (energy per entry) and `gate` (importance, of heads and neurons).
        every_n_steps: Cadence, in optimizer steps; 200 unless given.
        match: Parameters to watch: globs, `re:REGEX`, `type:LAYERCLASS`; all unless given. Frozen ones are left out.
        exclude: The same, taken away.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Importance of single heads: `True`, `False`, or "auto": from "standard" on, if there are at
            most 100.
        seed: Of the weights that are drawn for the masks of models with more than 262,144.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; there are none by default. `EarlyBirdAlert()` tells when the ticket has
            settled.
        densities: Parts of the weights that the masks keep; none for no masks.
        heads: Number of heads by pattern of layer, `{"*.attn.out": 8}`, for output projections of attention that are
            not found.
        neurons: Layers whose inputs are neurons, by pattern, where those that are found are not what you mean.
        reference: Checkpoint of another run that was watched by this monitor: whether the same heads and neurons
            matter.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is another word or out of its range, the reference cannot be read; when training starts: a
            pattern fits nothing, units that were named are not there, the reference is of another model, parameters are
            sharded.

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
