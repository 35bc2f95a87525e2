"""`RankMonitor`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.measuring.probe import Probe, offers
from lightning_lowrank.measuring.source import Source
from lightning_lowrank.measuring.sources.displacement import Displacement
from lightning_lowrank.measuring.sources.features import Features
from lightning_lowrank.measuring.sources.gradients import Gradients
from lightning_lowrank.measuring.sources.optimizer_state import OptimizerState
from lightning_lowrank.measuring.sources.updates import Updates
from lightning_lowrank.measuring.sources.weights import Weights
from lightning_lowrank.models.views import View
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence

OF_PARAMETERS: dict[str, list[Callable[..., Source]]] = {
    "gradients": [Gradients],
    "weights": [Weights],
    "updates": [Updates],
    "displacement": [Displacement],
    "optimizer_state": [partial(OptimizerState, "first_moment"), partial(OptimizerState, "second_moment")],
}
OF_LAYERS: dict[str, list[Callable[..., Source]]] = {
    "features": [Features],
    "centred_features": [partial(Features, centred=True)],
    "validation_features": [partial(Features, stage="validation")],
}
SOURCES = OF_PARAMETERS | OF_LAYERS


class RankMonitor(Monitor):
    """How many directions gradients, weights and updates use: their effective ranks, at every layer.

    Cost: one eigensolver call per matrix and sample, for each of the three default sources; see docs/evidence/cost.md.

    Args:
        sources: Any of `gradients`, `weights`, `updates`, `displacement` (keeps a copy of the weights),
            `optimizer_state`, `features`, `centred_features`, `validation_features`.
        statistics: Names of statistics; a parameter is part of the name, as in `energy_rank_0.01`. A statistic is only
            measured for the sources that offer it (`weight_ratio`: changes; `subspace_overlap` and `spectrum_drift`:
            all but features).
        every_n_steps: Cadence in optimizer steps; default 50.
        match: Parameters (for features: layers) to watch: globs, `re:REGEX`, `type:LAYERCLASS`.
        exclude: Patterns of what to leave out, as for `match`.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single sites: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        histograms: Whether to write spectra as TensorBoard histograms, too.
        seed: Seed for sketches of matrices above 1500 a side.
        name: Prefix of all tags.
        alerts: Alert rules; "default" warns of events that are rarely healthy, None turns alerts off.
        min_size: Smallest length of the shorter side of a matrix to watch.
        heads: Split attention weights by head.
        views: Your own einops patterns by parameter name (glob), as in `{"*.fused": "(heads d) n -> heads d n"}`.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.
        spread: Number of later batches over which decompositions are spread, so that no step waits for all of them. The
            numbers then arrive that many batches later.

    Raises:
        ValueError: A source, a statistic or an option is unknown, or both a cadence and a budget are given. When
            training starts: a pattern matches nothing, or an alert's quantity is not measured.

    Examples:
        >>> [recorder.name for recorder in RankMonitor(sources=["gradients", "optimizer_state"]).recorders]
        ['gradient', 'first_moment', 'second_moment']
    """

    word = "rank"

    def __init__(
        self,
        sources: str | Sequence[str] = ("gradients", "weights", "updates"),
        statistics: str | Sequence[str] = ("energy_rank", "stable_rank", "effective_rank", "participation_ratio"),
        every_n_steps: int | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        histograms: bool = False,
        seed: int = 0,
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = "default",
        min_size: int = 2,
        heads: bool = False,
        views: Mapping[str, str | View] | None = None,
        max_overhead: float | None = None,
        spread: int = 0,
    ) -> None:
        sources, statistics = _sequence(sources), _sequence(statistics)
        unknown = [source for source in sources if source not in SOURCES]
        if unknown or not sources:
            raise ValueError(f"RankMonitor(sources={list(sources)}): {unknown} is unknown; choose from {list(SOURCES)}")
        of_layers: dict[str, Any] = {"match": match, "exclude": exclude}
        of_parameters = of_layers | {"min_size": min_size, "heads": heads, "views": views}
        built = [
            make(**of_layers if source in OF_LAYERS else of_parameters)
            for source in sources
            for make in SOURCES[source]
        ]
        schedule = cadence(every_n_steps, max_overhead, 50)
        # What only some sources offer is asked of those; where nothing is left, the probe says what there is.
        offered = [
            [name for name in statistics if offers(one, name) or not any(offers(other, name) for other in built)]
            for one in built
        ]
        probes = [
            Probe(one.name, one, asked or statistics, schedule) for one, asked in zip(built, offered, strict=True)
        ]
        super().__init__(
            probes,
            detail=detail,
            per_site=per_site,
            histograms=histograms,
            seed=seed,
            alerts=alerts,
            name=name,
            spread=spread,
        )


def _sequence(names: str | Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names
