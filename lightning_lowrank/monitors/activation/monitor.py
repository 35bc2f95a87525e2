"""`ActivationMonitor`."""

from collections.abc import Sequence
from typing import Literal

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.monitors.activation.source import Activations
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class ActivationMonitor(Monitor):
    """How large what flows through the blocks is, and how it grows over depth, forwards and backwards.

    Residual streams that grow, gradients that vanish or explode between blocks, branches that no longer write, and few
    channels that are a hundred times larger than the others: each is the beginning of a failure that the loss shows
    later, or of one that half precision meets first.

    Writes medians over blocks of `activation/rms`, `activation/growth` (of the RMS, from what comes into a block to
    what leaves it), `activation/massive_ratio` (largest channel over the median one) and `activation/gradient_gain`
    (the norm of the loss's gradient in what comes in over that in what leaves); from "standard" on single blocks, what
    each branch writes, kurtosis and dormant share of channels, uniformity of the rows of weights, and alignment of top
    singular vectors from block to block.

    Cost: on due steps seven passes over the outputs of the blocks, two over the gradients in them and two over their
    branches; the eigenvectors of the first and last matrix of each block.

    Args:
        every_n_steps: Cadence, in optimizer steps; 100 unless given.
        match: Blocks: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`. Unless given what stands in lists of
            layers of one class; linear, convolutional, embedding, attention and recurrent layers where there are none.
        exclude: The same, taken away.
        max_width: Weights whose shorter side is longer have no singular vectors, and no alignment; 0 for none.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single sites: `True`, `False`, or "auto": from "standard" on, if there are at most 100.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; by default those that were early and quiet (docs/evidence/warnings.md).
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of its range; when training starts: a pattern matches nothing, or a block cannot be
            heard.

    Examples:
        >>> ActivationMonitor(every_n_steps=10).recorders[0].quantities[:3]
        ['activation_rms', 'activation_growth', 'activation_depth_growth']

    References:
        Sun et al. (2024), Massive Activations in Large Language Models, arXiv 2402.17762. He et al. (2024),
        Understanding and Minimising Outlier Features in Transformer Training. Sokar et al. (2023), Definition 3.2.
    """

    word = "activation"

    def __init__(
        self,
        every_n_steps: int | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        max_width: int = 2048,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = "default",
        max_overhead: float | None = None,
    ) -> None:
        probes = probe_of(Activations(match, exclude, max_width), cadence(every_n_steps, max_overhead, 100))
        super().__init__(probes, detail=detail, per_site=per_site, alerts=alerts, name=name)
