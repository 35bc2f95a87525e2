"""`MultifractalMonitor`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_lowrank.maths.scaling.multifractal import MODES
from lightning_lowrank.maths.scaling.neuromfa import THRESHOLD
from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.models.views import View
from lightning_lowrank.monitors.multifractal.network_source import NeuroMFA
from lightning_lowrank.monitors.multifractal.source import Multifractal
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class MultifractalMonitor(Monitor):
    """How much the neurons of a model differ from each other: multifractal statistics of its weights, with their values
    by chance.

    The monitor only reads weights, before the step.

    Args:
        mode: "rank": every matrix in both directions, independent of scale and of a choice of distance. "neuromfa": the
            whole model as one network by the published recipe, with the degree of emergence, and compared with shuffled
            and Gaussian weights.
        every_n_steps: Cadence in optimizer steps; default 500.
        match: Parameters to watch: globs, `re:REGEX`, `type:LAYERCLASS`; by default all matrices, in "neuromfa" without
            embeddings.
        exclude: Patterns of what to leave out, as for `match`.
        max_neurons: Number of neurons to use per matrix or layer, the same ones at every sample; all by default.
            "neuromfa" was published with 32.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single sites: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        seed: Seed for the choice of neurons and for the nulls.
        name: Prefix of all tags.
        alerts: Alert rules; none by default.
        heads: For "rank": split attention weights by head.
        views: Your own einops patterns by parameter name (glob), as for `RankMonitor`.
        threshold: For "neuromfa": longest edge `1 / |w|` that is kept; None uses three divided by the root mean square
            of the first weights.
        num_repeats: For "neuromfa" with `max_neurons`: number of random subsets of neurons to average over.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is unknown, out of range, or belongs to the other mode; when training starts: a pattern
            matches nothing.

    Examples:
        >>> MultifractalMonitor().recorders[0].quantities[:3]
        ['multifractal_dispersion', 'multifractal_dispersion_chance', 'multifractal_alpha0']
    """

    word = "multifractal"

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """None."""
        return []

    def __init__(
        self,
        mode: Literal["rank", "neuromfa"] = "rank",
        every_n_steps: int | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        max_neurons: int | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        seed: int = 0,
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = "default",
        heads: bool = False,
        views: Mapping[str, str | View] | None = None,
        threshold: float | None = THRESHOLD,
        num_repeats: int = 10,
        max_overhead: float | None = None,
    ) -> None:
        of_both: dict[str, Any] = {
            "match": match,
            "exclude": exclude,
            "max_neurons": max_neurons,
            "views": views,
            "seed": seed,
        }
        if mode not in MODES:
            raise ValueError(f"MultifractalMonitor(mode={mode!r}): mode must be one of {list(MODES)}")
        if mode == "rank" and (threshold, num_repeats) != (THRESHOLD, 10):
            raise ValueError(
                f"threshold={threshold} and num_repeats={num_repeats} need mode='neuromfa', since mode='rank' has "
                "no edge lengths"
            )
        if mode == "neuromfa" and heads:
            raise ValueError("heads=True needs mode='rank', since mode='neuromfa' uses one chain of whole layers")
        whole: dict[str, Any] = {"threshold": threshold, "num_repeats": num_repeats}
        source = Multifractal(heads=heads, **of_both) if mode == "rank" else NeuroMFA(**whole, **of_both)
        self.word = source.name
        schedule = cadence(every_n_steps, max_overhead, 500)
        super().__init__(
            probe_of(source, schedule), detail=detail, per_site=per_site, seed=seed, alerts=alerts, name=name
        )
