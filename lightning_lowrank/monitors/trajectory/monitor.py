"""`TrajectorySubspace`: how many directions the run's own path uses."""

from collections.abc import Sequence
from typing import Literal

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.measuring.schedules import Every
from lightning_lowrank.monitors.trajectory.source import Trajectory
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class TrajectorySubspace(Monitor):
    """How many directions the path of the parameters uses, beside a random walk seen at the same times.

    Keeps snapshots of the parameters along the run and the inner products of all that they have moved. The explained
    variances are those of a principal component analysis of the snapshots and the parameters of now. A random walk in
    any number of dimensions has 0.61 of its variance in one component, 0.15 in the second, 0.07 in the third: a path
    that looks flat may be nothing but continuous, so that each number has the walk's beside it.

    Writes `trajectory/explained_1`, `trajectory/participation_ratio`, each also with `_random_walk`; at "standard" also
    `explained_2`, `explained_4`, `straightness` (distance from the first to the last point over the length of the way)
    and `snapshots`.

    Cost: `max_snapshots` inner products of all parameters on due steps. Memory: a copy of the parameters, and one in
    float32 per further snapshot, where the parameters are and in checkpoints: `lowrank/trajectory_bytes`. A copy to the
    host would wait for the device.

    Args:
        every_n_steps: Least number of optimizer steps between two snapshots, and the cadence of the curves; 50 unless
            given.
        max_snapshots: How many are kept, 8 at least. When there is one more, every second one goes, and from then on
            they are twice as far apart.
        match: Parameters: globs, `re:REGEX`, `type:LAYERCLASS`; all that are trained at the start unless given.
        exclude: The same, taken away.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Without effect: there are no sites.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; there are none by default.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of its range; when training starts: a pattern matches nothing, nothing that it fits is
            trained, or parameters are sharded.

    Examples:
        >>> TrajectorySubspace(every_n_steps=10).recorders[0].quantities[:2]
        ['trajectory_explained_1', 'trajectory_explained_1_random_walk']

    References:
        Antognini & Sohl-Dickstein (2018), PCA of high dimensional random walks with comparison to neural network
        training, arXiv:1806.08805, Section 2.
    """

    word = "trajectory"

    def __init__(
        self,
        every_n_steps: int | None = None,
        max_snapshots: int = 32,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = "default",
        max_overhead: float | None = None,
    ) -> None:
        schedule = cadence(every_n_steps, max_overhead, 50)
        # A budget chooses how far apart they are, too.
        source = Trajectory(schedule.n if isinstance(schedule, Every) else 1, max_snapshots, match, exclude)
        super().__init__(probe_of(source, schedule), detail=detail, per_site=per_site, alerts=alerts, name=name)

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """None."""
        return []
