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
    """How unlike each other the neurons of a model become: multifractal statistics of its weights, beside what chance
    gives.

    It reads weights, before the step, and nothing else.

    Args:
        mode: "rank": every matrix in both directions, free of scale and of a choice of distance. "neuromfa": the whole
            model as one network by the published recipe, beside shuffled and Gaussian weights, with the degree of
            emergence.
        every_n_steps: Cadence, in optimizer steps; 500 unless given.
        match: Parameters to watch: globs, `re:REGEX`, `type:LAYERCLASS`; all matrices unless given, for "neuromfa" but
            embeddings.
        exclude: The same, taken away.
        max_neurons: Neurons that are looked at, per matrix or layer, the same at every sample; all unless given.
            "neuromfa" was published with 32.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single sites: `True`, `False`, or "auto": from "standard" on, if there are at
            most 100.
        seed: Of the neurons that are drawn, and of the nulls.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; there are none by default.
        heads: Of "rank": split attention weights by head.
        views: Your own einops patterns by parameter name (glob), as for `RankMonitor`.
        threshold: Of "neuromfa": longest edge `1 / |w|` that is kept; None takes three over the root mean square of the
            first weights seen.
        num_repeats: Of "neuromfa" with `max_neurons`: samples of neurons that are averaged over.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is another word, out of its range, or of the other mode; when training starts: a pattern
            fits nothing.

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
            raise ValueError(f"MultifractalMonitor(mode={mode!r}): one of {list(MODES)}")
        if mode == "rank" and (threshold, num_repeats) != (THRESHOLD, 10):
            raise ValueError(
                f"threshold={threshold} and num_repeats={num_repeats} are of mode='neuromfa': mode='rank' "
                "has no edge lengths"
            )
        if mode == "neuromfa" and heads:
            raise ValueError("heads=True is of mode='rank': mode='neuromfa' has one chain of whole layers")
        whole: dict[str, Any] = {"threshold": threshold, "num_repeats": num_repeats}
        source = Multifractal(heads=heads, **of_both) if mode == "rank" else NeuroMFA(**whole, **of_both)
        self.word = source.name
        schedule = cadence(every_n_steps, max_overhead, 500)
        super().__init__(
            probe_of(source, schedule), detail=detail, per_site=per_site, seed=seed, alerts=alerts, name=name
        )
