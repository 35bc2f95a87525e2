"""All monitors that need no options, under one budget."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_lowrank.measuring.allowances import Allowance, Purse, Wish
from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.monitors.activation.monitor import ActivationMonitor
from lightning_lowrank.monitors.anatomy.monitor import GradientAnatomyMonitor
from lightning_lowrank.monitors.attention.monitor import AttentionMonitor
from lightning_lowrank.monitors.concentration.monitor import ConcentrationMonitor
from lightning_lowrank.monitors.curvature.monitor import CurvatureMonitor
from lightning_lowrank.monitors.dormant_units import DormantUnitsMonitor
from lightning_lowrank.monitors.loss import LossMonitor
from lightning_lowrank.monitors.multifractal.monitor import MultifractalMonitor
from lightning_lowrank.monitors.noise_scale import NoiseScaleMonitor
from lightning_lowrank.monitors.rank import RankMonitor
from lightning_lowrank.monitors.representation.monitor import RepresentationMonitor
from lightning_lowrank.monitors.router import RouterMonitor
from lightning_lowrank.monitors.tangent_kernel.monitor import NTKMonitor
from lightning_lowrank.watching.monitor import Monitor

STATISTICS = ("energy_rank", "stable_rank", "effective_rank", "participation_ratio", "spectral_norm", "weight_ratio")
OF_LAYERS: dict[str, Any] = {"sources": ["features"], "statistics": STATISTICS[:5], "name": "layers"}


@dataclass(frozen=True)
class Entry:
    """A monitor with its cost and its preferred cadence.

    Attributes:
        kind: Its class, or a function that creates it.
        wish: The cost of a sample (docs/how-to/choose-cadence.md), and how often it is useful.
    """

    kind: Callable[..., Monitor]
    wish: Wish

    def made(self, share: float, detail: Detail) -> Monitor:
        """The monitor with its default options."""
        options: dict[str, Any] = {"max_overhead": share, "detail": detail}
        return self.kind(**options)


# Sizes too: weights that outgrow the others, and updates beside them, are what a diagnosis asks for first.
RANKS = partial(RankMonitor, statistics=STATISTICS)
ENTRIES = (
    Entry(RANKS, Wish(1.0, 0.02, 50, needed=True, weight=4)),
    Entry(LossMonitor, Wish(0.1, 0.002, 5, needed=True, weight=4)),
    Entry(DormantUnitsMonitor, Wish(0.2, 0.002, 50)),
    Entry(AttentionMonitor, Wish(0.5, 0.005, 50)),
    Entry(RouterMonitor, Wish(0.2, 0.002, 50)),
    Entry(ActivationMonitor, Wish(2.0, 0.004, 50)),
    Entry(NoiseScaleMonitor, Wish(3.0, 0.006, 100)),
    Entry(partial(RankMonitor, **OF_LAYERS), Wish(2.0, 0.002, 100)),
    Entry(RepresentationMonitor, Wish(3.0, 0.002, 100)),
    Entry(ConcentrationMonitor, Wish(2.5, 0.012, 200)),
    Entry(CurvatureMonitor, Wish(10.0, 0.0, 100)),
    Entry(GradientAnatomyMonitor, Wish(17.0, 0.005, 200)),
    Entry(NTKMonitor, Wish(150.0, 0.0, 1000)),
    Entry(MultifractalMonitor, Wish(5.5, 0.018, 500)),
)


def watch_all(max_overhead: float = 0.05, detail: Detail = "core") -> list[Monitor]:
    """All monitors that need no options, for users who do not want to choose: `callbacks=[*watch_all()]`.

    All share one budget, which covers the first samples too. Cheap monitors sample as often as is useful, expensive
    ones as seldom as needed. Shares follow the measured costs of samples. A monitor is left out, with a message, if
    three of its samples do not fit beside cheaper ones. The same holds for a monitor that finds nothing to watch.
    `RankMonitor` and `LossMonitor` have three samples in every run of 200 steps or more, whatever they cost. If that
    exceeds the budget, later samples are fewer.

    Args:
        max_overhead: Largest increase of training time by all together, 0.05 for 5 %.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.

    Returns:
        Monitors for one run; create new ones for a second run.

    Raises:
        ValueError: The share is not between 0 and 1.

    Examples:
        >>> [type(monitor).__name__ for monitor in watch_all()][:3]
        ['RankMonitor', 'LossMonitor', 'DormantUnitsMonitor']
    """
    purse, monitors = Purse(max_overhead), []
    for entry in ENTRIES:
        monitor = entry.made(max_overhead, detail)
        _keep(monitor, purse.allowance(entry.wish, monitor.label))
        monitors.append(monitor)
    return monitors


def _keep(monitor: Monitor, allowance: Allowance) -> None:
    """Have it keep to this budget in the place of the one that it was made with."""
    watch = monitor.watch
    watch.budget = watch.journal.budget = watch.asking.budget = allowance
    for recorder in watch.recorders:
        recorder.probe = replace(recorder.probe, schedule=allowance)
