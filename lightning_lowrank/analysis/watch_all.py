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

# Trials of what is cheap, whose first point is before anything was learnt, and of what is dear.
CHEAP, DEAR = (0, 40), (20, 100)
STATISTICS = ("energy_rank", "stable_rank", "effective_rank", "participation_ratio", "spectral_norm", "weight_ratio")
OF_LAYERS: dict[str, Any] = {"sources": ["features"], "statistics": STATISTICS[:5], "name": "layers"}


@dataclass(frozen=True)
class Entry:
    """A monitor with its cost and its preferred cadence.

    Attributes:
        kind: Its class, or a function that creates it.
        cost: Cost of a sample in steps of training (docs/how-to/choose-cadence.md).
        least: Smallest number of steps between two samples.
    """

    kind: Callable[..., Monitor]
    cost: float
    least: int

    def wish(self, i: int) -> Wish:
        """Its request to the budget; expensive monitors have their trials one after the other."""
        if self.kind is RANKS:
            return Wish(self.cost, self.least, (0, 50, 100), needed=True)
        return Wish(self.cost, self.least, CHEAP if self.cost < 3 else (DEAR[0] + i, DEAR[1] + i))

    def made(self, share: float, detail: Detail) -> Monitor:
        """The monitor with its default options."""
        options: dict[str, Any] = {"max_overhead": share, "detail": detail}
        return self.kind(**options)


# Sizes too: weights that outgrow the others, and updates beside them, are what a diagnosis asks for first.
RANKS = partial(RankMonitor, statistics=STATISTICS)
ENTRIES = (
    Entry(RANKS, 1.0, 50),
    Entry(LossMonitor, 0.1, 5),
    Entry(DormantUnitsMonitor, 0.2, 50),
    Entry(AttentionMonitor, 0.5, 50),
    Entry(RouterMonitor, 0.2, 50),
    Entry(ActivationMonitor, 1.5, 50),
    Entry(NoiseScaleMonitor, 1.5, 100),
    Entry(partial(RankMonitor, **OF_LAYERS), 2.0, 100),
    Entry(RepresentationMonitor, 2.5, 100),
    Entry(ConcentrationMonitor, 1.0, 200),
    Entry(CurvatureMonitor, 5.0, 100),
    Entry(GradientAnatomyMonitor, 10.0, 200),
    Entry(NTKMonitor, 100.0, 1000),
    Entry(MultifractalMonitor, 50.0, 500),
)


def watch_all(max_overhead: float = 0.05, detail: Detail = "core") -> list[Monitor]:
    """All monitors that need no options, for users who do not want to choose: `callbacks=[*watch_all()]`.

    All share one budget. Cheap monitors sample as often as is useful, expensive ones as seldom as needed. In the
    warm-up each takes one to three samples, from which its cadence is chosen. It takes three if its cadence leaves no
    room for more. After the warm-up, all together make training longer by at most `max_overhead`. A monitor is left
    out, with a message, if three of its samples do not fit beside cheaper ones by their costs in other trainings. The
    same holds for a monitor that finds nothing to watch. `RankMonitor` has samples at steps 0, 50 and 100 whatever they
    cost.

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
    for i, entry in enumerate(ENTRIES):
        monitor = entry.made(max_overhead, detail)
        _keep(monitor, purse.allowance(entry.wish(i)))
        monitors.append(monitor)
    return monitors


def _keep(monitor: Monitor, allowance: Allowance) -> None:
    """Have it keep to this budget in the place of the one that it was made with."""
    watch = monitor.watch
    watch.budget = watch.journal.budget = allowance
    for recorder in watch.recorders:
        recorder.probe = replace(recorder.probe, schedule=allowance)
