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
    """How many directions the representation uses after each block, with and without its mean, and how fast its
    eigenvalues fall.

    A collapsed representation uses few directions whatever the input, and later layers cannot restore the lost ones.
    The numbers of rows and columns limit all ranks, so read them together, and compare with the values for Gaussian
    rows of the same shape.

    Writes medians over blocks of `representation/effective_rank` (RankMe), `representation/centred_effective_rank` and
    `representation/alpha` (alpha-ReQ; 1 is the claimed optimum); single blocks from "standard" on, and in the tab.

    With a `classifier`, the monitor also measures from "standard" on how well the classes of the training batch are
    separated. This is LiDAR of each block, and neural collapse (`representation/nc1`, `nc2_norms`, `nc2_angles`, `nc3`)
    of the classifier's input.

    Cost per sample: one pass over the outputs of the blocks, rows times width squared for their Gram matrix in float64,
    and two eigenvalue problems of it.

    Args:
        every_n_steps: Cadence in optimizer steps; default 100. Validation is read at each of its loops.
        match: Layers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`. By default the blocks, which are the
            entries of lists of layers of one class; if there are none, linear, convolutional, embedding, attention and
            recurrent layers.
        exclude: Patterns of what to leave out, as for `match`.
        stages: "train", "validation", or both.
        max_width: Outputs wider than this are left out.
        classifier: Name of the linear layer that computes the logits of the classes.
        labels: `batch -> labels`, one integer for each example. By default the second part of a batch, or its entry
            "labels", "label", "targets", "target" or "y".
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single blocks: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.
        alerts: Alert rules; none by default.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of range; when training starts: a pattern matches nothing, or a layer cannot be
            measured.

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
            raise ValueError(f"stages={list(stages)} must contain some of {list(get_args(Stage))}")
        schedule = cadence(every_n_steps, max_overhead, 100)
        sources: list[NumberSource] = [
            Representations(match, exclude, stage, max_width) for stage in get_args(Stage) if stage in stages
        ]
        if classifier is not None:
            sources.append(Classes(classifier, match, exclude, max_width, labels))
        elif labels is not None:
            raise ValueError("labels need a classifier; give the name of a linear layer, such as classifier='head'")
        probes = [probe for source in sources for probe in probe_of(source, schedule)]
        super().__init__(probes, detail=detail, per_site=per_site, alerts=alerts, name=name)

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """None, since the rank of a representation dips in healthy warm-up."""
        return []
