"""`RepresentationMonitor`: how many directions the representations of each block use, over depth."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_lowrank.measuring.number_source import Detail, NumberSource
from lightning_lowrank.monitors.representation.classes import Classes
from lightning_lowrank.monitors.representation.source import Representations, Stage
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class RepresentationMonitor(Monitor):
    """How many directions the representation uses after each block, as it is and about its mean; how fast its
    eigenvalues fall.

    A representation that collapses uses few directions whatever the input, and later layers cannot get back what is
    lost. Read all of these beside rows and width, which cap them, and beside what Gaussian rows of that shape give.

    Writes medians over blocks of `representation/effective_rank` (RankMe), `representation/centred_effective_rank` and
    `representation/alpha` (alpha-ReQ; 1 is the claimed optimum); single blocks from "standard" on, and in the tab.

    With a `classifier`, also how far the classes of the training batch are apart, from "standard" on: LiDAR of each
    block, and neural collapse (`representation/nc1`, `nc2_norms`, `nc2_angles`, `nc3`) of what comes into it.

    Cost: one pass over the outputs of the blocks on due steps, width times rows for their Gram matrix in float64, and
    two solves of it.

    Args:
        every_n_steps: Cadence, in optimizer steps; 100 unless given. Validation is read at each of its loops.
        match: Layers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`. Unless given the blocks: what stands
            in lists of layers of one class; linear, convolutional, embedding, attention and recurrent layers where
            there are none.
        exclude: The same, taken away.
        stages: "train", "validation", or both.
        max_width: Wider outputs are left out.
        classifier: Name of the linear layer that puts out a logit for each class.
        labels: `batch -> labels`, one whole number for each example. Unless given the second part of a batch, or its
            "labels", "label", "targets", "target" or "y".
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single blocks: `True`, `False`, or "auto": from "standard" on, if there are at most 100.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; there are none by default.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of its range; when training starts: a pattern fits nothing, or a layer cannot be
            heard.

    Examples:
        >>> RepresentationMonitor(every_n_steps=10).recorders[0].quantities[:3]
        ['representation_effective_rank', 'representation_centred_effective_rank', 'representation_alpha']

    References:
        Garrido et al. (2023), RankMe, ICML, Section 3.2. Agrawal et al. (2022), alpha-ReQ, NeurIPS. Thilak et al.
        (2024), LiDAR, ICLR. Papyan, Han & Donoho (2020), Prevalence of Neural Collapse, PNAS 117(40).
    """

    word = "representation"

    def __init__(
        self,
        every_n_steps: int | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        stages: Sequence[str] = ("train",),
        max_width: int = 2048,
        classifier: str | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = None,
        max_overhead: float | None = None,
    ) -> None:
        if not stages or set(stages) - set(get_args(Stage)):
            raise ValueError(f"stages={list(stages)}: any of {list(get_args(Stage))}")
        schedule = cadence(every_n_steps, max_overhead, 100)
        sources: list[NumberSource] = [
            Representations(match, exclude, stage, max_width) for stage in get_args(Stage) if stage in stages
        ]
        if classifier is not None:
            sources.append(Classes(classifier, match, exclude, max_width, labels))
        elif labels is not None:
            raise ValueError("labels are of use with a classifier: give classifier='head', the name of a linear layer")
        probes = [probe for source in sources for probe in probe_of(source, schedule)]
        super().__init__(probes, detail=detail, per_site=per_site, alerts=alerts, name=name)

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """None: the rank of a representation dips in healthy warm-up."""
        return []
