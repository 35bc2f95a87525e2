"""`AttentionMonitor`."""

from collections.abc import Mapping, Sequence
from typing import Literal

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.monitors.attention.source import AttentionHeads
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class AttentionMonitor(Monitor):
    """How each step changes what attention heads compare, and where they attend.

    A head compares queries with keys by `x' Wq' Wk y`. One step adds `dWq' Wk + Wq' dWk` to that product, and `dWq'
    dWk` to second order. If these use few directions, the step changes few comparisons. Compare them with earlier
    samples of the run, and with random matrices of the same shape. From calls of attention, on a random sample of
    queries: the largest score, the entropy of the attention weights, and the weight of the first key, the usual sink.

    Writes medians over heads of `attention/qk_update_stable_rank`, `attention/qk_update_effective_rank_energy`,
    `attention/entropy` and `attention/sink_share`, and `attention/largest_logit` of all heads. Single heads are
    `qk_update_stable_rank/<attention>.h<k>`, from "standard" on and in the tab. Biases are left out; with rotary
    positions the product is that at relative position 0.

    Cost: during a due step, a copy of the weights of queries and keys, and two thin QR factorisations per head of twice
    its width. In addition, `num_rows` rows of scores per call and head.

    Args:
        every_n_steps: Cadence in optimizer steps; default 50.
        match: Attention layers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`; all by default.
        exclude: Patterns of what to leave out, as for `match`.
        layouts: Axes of the output of a layer with queries or keys, by pattern of its weight, with the slowest axis
            first. Only needed if they are unknown: `{"*.qkv.weight": "qkv heads d"}`, or `"q heads d"` and `"k heads
            d"` for separate layers.
        heads: Number of heads by pattern of weight, if it is unknown.
        scores: Whether to observe calls of `scaled_dot_product_attention` and softmax over scores; use `False` for
            compiled models.
        num_rows: Number of rows of scores for each call and head.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single heads: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.
        alerts: Alert rules; by default those with early warnings and few false alarms (docs/evidence/warnings.md).
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of range. When training starts: there is no attention with known queries and keys,
            a pattern matches nothing, heads do not divide, or attention is inside a compiled module. The message says
            what was found and how to name it.

    Examples:
        >>> AttentionMonitor(every_n_steps=10).recorders[0].quantities[:2]
        ['qk_update_effective_rank_energy', 'qk_update_stable_rank']

    References:
        arXiv 2606.28116 (2026), for spectra of the update of `Wq' Wk` as an early signal. Zhai et al. (2023),
        Stabilizing Transformer Training by Preventing Attention Entropy Collapse, for entropy. Xiao et al. (2024),
        Efficient Streaming Language Models with Attention Sinks, for the share of the first key.
    """

    word = "attention"

    def __init__(
        self,
        every_n_steps: int | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        layouts: Mapping[str, str] | None = None,
        heads: Mapping[str, int] | None = None,
        scores: bool = True,
        num_rows: int = 64,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = "default",
        max_overhead: float | None = None,
    ) -> None:
        source = AttentionHeads(match, exclude, layouts=layouts, heads=heads, scores=scores, num_rows=num_rows)
        probes = probe_of(source, cadence(every_n_steps, max_overhead, 50))
        super().__init__(probes, detail=detail, per_site=per_site, alerts=alerts, name=name)
