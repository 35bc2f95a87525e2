"""`ActivationMonitor`."""

from collections.abc import Sequence
from typing import Literal

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.monitors.activation.source import Activations
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class ActivationMonitor(Monitor):
    """How large the activations and gradients between blocks are, and how they grow over depth.

    It shows growing residual streams, gradients that vanish or explode between blocks, branches with almost no output,
    and channels that are a hundred times larger than the others. These precede failures that the loss shows only later,
    or that occur in half precision first.

    Writes medians over blocks: `activation/rms`; `activation/growth`, the RMS of the output over that of the input;
    `activation/massive_ratio`, the largest channel over the median one; and `activation/gradient_gain`. The latter is
    the norm of the loss's gradient at the input over that at the output. From "standard" on, also single blocks: output
    of each branch, kurtosis and dormant share of channels, uniformity of the rows of weights, and alignment of top
    singular vectors between blocks.

    Cost: on due steps, seven passes over the outputs of the blocks, two over their gradients and two over their
    branches. In addition, the eigenvectors of the first and last matrix of each block.

    Args:
        every_n_steps: Cadence in optimizer steps; default 100.
        match: Blocks: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`. By default the entries of lists of
            layers of one class; if there are none, linear, convolutional, embedding, attention and recurrent layers.
        exclude: Patterns of what to leave out, as for `match`.
        max_width: Longest short side of weights whose singular vectors are used for the alignment; 0 for none.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single sites: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.
        alerts: Alert rules; by default those with early warnings and few false alarms (docs/evidence/warnings.md).
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of range; when training starts: a pattern matches nothing, or a block cannot be
            measured.

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
