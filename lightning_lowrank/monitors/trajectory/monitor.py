"""`TrajectorySubspace`: how many directions the run's own path uses."""

from collections.abc import Sequence
from typing import Literal

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.measuring.schedules import Every
from lightning_lowrank.monitors.trajectory.source import Trajectory
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class TrajectorySubspace(Monitor):
    """How many directions the path of the parameters uses, compared with a random walk at the same times.

    It keeps snapshots of the parameters along the run, and inner products of their displacements. The explained
    variances are those of a principal component analysis of the snapshots and the current parameters. A random walk in
    any number of dimensions has 0.61 of its variance in one component, 0.15 in the second, 0.07 in the third. A path
    that looks flat may therefore be merely continuous, so each number comes with that of the walk.

    Writes `trajectory/explained_1` and `trajectory/participation_ratio`, each also with `_random_walk`. At "standard"
    also `explained_2`, `explained_4`, `straightness` (distance from the first to the last point over the length of the
    path) and `snapshots`.

    Cost: `max_snapshots` inner products of all parameters on due steps. Memory: a copy of the parameters, and one in
    float32 for each further snapshot, on the device and in checkpoints: `lowrank/trajectory_bytes`. A copy to the host
    would wait for the device.

    Args:
        every_n_steps: Smallest number of optimizer steps between two snapshots, and the cadence of the curves; default
            50.
        max_snapshots: Number of snapshots to keep, at least 8. When there is one more, every second one is dropped, and
            the distance between snapshots doubles.
        match: Parameters: globs, `re:REGEX`, `type:LAYERCLASS`; all that are trained at the start by default.
        exclude: Patterns of what to leave out, as for `match`.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Has no effect, because there are no sites.
        name: Prefix of all tags.
        alerts: Alert rules; none by default.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of range; when training starts: a pattern matches nothing or no trained parameter,
            or parameters are sharded.

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
