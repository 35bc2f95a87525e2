"""The names that users type: short functions that return a `Monitor`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lightning_lowrank.alerts.rules import Alert
from lightning_lowrank.kernels import KernelName
from lightning_lowrank.monitor import Monitor
from lightning_lowrank.probe import Probe, offers
from lightning_lowrank.scaling.multifractal import MODES
from lightning_lowrank.scaling.neuromfa import THRESHOLD
from lightning_lowrank.schedules import Budget, Every
from lightning_lowrank.sources.curvature import Curvature, Detail
from lightning_lowrank.sources.displacement import Displacement
from lightning_lowrank.sources.features import Features
from lightning_lowrank.sources.gradients import Gradients
from lightning_lowrank.sources.multifractal import Multifractal
from lightning_lowrank.sources.neuromfa import NeuroMFA
from lightning_lowrank.sources.optimizer_state import OptimizerState
from lightning_lowrank.sources.source import Source
from lightning_lowrank.sources.tangent_kernel import TangentKernel
from lightning_lowrank.sources.updates import Updates
from lightning_lowrank.sources.weights import Weights
from lightning_lowrank.views import View

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


def RankMonitor(
    sources: str | Sequence[str] = ("gradients", "weights", "updates"),
    statistics: str | Sequence[str] = ("energy_rank", "stable_rank", "effective_rank", "participation_ratio"),
    every_n_steps: int | None = None,
    match: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
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
) -> Monitor:
    """How many directions gradients, weights and updates really use: their effective ranks, at every layer.

    Cost: one eigensolver call per matrix and due step, on the default three sources; see the benchmark of overhead.

    Args:
        sources: Any of `gradients`, `weights`, `updates`, `displacement` (keeps a copy of the weights), `optimizer_state`, `features`,
            `centred_features`, `validation_features`.
        statistics: Names as in the concepts page; parameters stand in the name, `energy_rank_0.01`. What
            only some of the sources offer (`weight_ratio`: changes; `subspace_overlap`: not features) is asked of those.
        every_n_steps: Cadence, in optimizer steps; 50 unless given.
        match: Parameters (for features: layers) to watch: globs, `re:REGEX`, `type:LAYERCLASS`.
        exclude: The same, taken away.
        per_site: Scalars of single sites: `True`, `False`, or "auto": if there are at most 100.
        histograms: Also the spectra, as TensorBoard histograms.
        seed: Of the sketches of matrices above 1500 a side.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; "default" warns of what is rarely healthy, None of nothing.
        min_size: Shortest side of a matrix to watch.
        heads: Split attention weights by head.
        views: Your own einops patterns by parameter name (glob), as in `{"*.fused": "(heads d) n -> heads d n"}`.
        max_overhead: Share of training time that watching may take, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: A source, a statistic or an option is unknown, there is both a cadence and a budget; when training starts: a pattern
            matches nothing; an alert is on what is not measured.

    Example:
        >>> [recorder.name for recorder in RankMonitor(sources=["gradients", "optimizer_state"]).recorders]
        ['gradient', 'first_moment', 'second_moment']
    """
    sources, statistics = _sequence(sources), _sequence(statistics)
    unknown = [source for source in sources if source not in SOURCES]
    if unknown or not sources:
        raise ValueError(f"RankMonitor(sources={list(sources)}): unknown {unknown}; there are {list(SOURCES)}")
    of_layers: dict[str, Any] = {"match": match, "exclude": exclude}
    of_parameters = of_layers | {"min_size": min_size, "heads": heads, "views": views}
    built = [make(**of_layers if source in OF_LAYERS else of_parameters) for source in sources for make in SOURCES[source]]
    schedule = _schedule(every_n_steps, max_overhead)
    # What only some sources offer is asked of those; where nothing is left, the probe says what there is.
    offered = [[name for name in statistics if offers(one, name) or not any(offers(other, name) for other in built)] for one in built]
    probes = [Probe(one.name, one, asked or statistics, schedule) for one, asked in zip(built, offered, strict=True)]
    return Monitor(probes, per_site=per_site, histograms=histograms, seed=seed, alerts=alerts, name=name, label="rank")


def CurvatureMonitor(
    level: Detail = "light",
    operators: Sequence[str] = ("hessian", "gauss_newton"),
    top_k: int = 5,
    every_n_steps: int | None = None,
    batch: Literal["live", "fixed"] = "live",
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    output_module: str | None = None,
    match: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    per_site: bool | Literal["auto"] = "auto",
    seed: int = 0,
    name: str | None = None,
    *,
    alerts: Sequence[Alert] | Literal["default"] | None = "default",
    max_overhead: float | None = None,
) -> Monitor:
    """Curvature of the training's own loss: sharpness against the edge of stability, sketches of Hessian, Gauss-Newton and Fisher matrix.

    The loss is seen on the graph of the training step itself, with no second forward pass and no second loss function; where that would
    change the training's last bits, or shows nothing (fused attention, compiled modules, static graphs of DDP), a kept batch is run through
    `training_step` once more, with everything put back that it changes. Which of both is said at the start.

    Args:
        level: "light": batch sharpness. "standard": also the top of the spectrum, traces, critical sharpness, what part of gradient,
            update and displacement lies in the top directions, participation ratios of all but the Hessian. "full": also all of the
            spectrum by quadrature: effective ranks, negative mass, the smallest eigenvalue, densities.
        operators: Any of `hessian`, `gauss_newton`, `empirical_fisher`, `monte_carlo_fisher`; none for critical sharpness alone, which
            takes forward passes only and works where the loss cannot be differentiated twice.
        top_k: Directions that are followed.
        every_n_steps: Cadence, in optimizer steps; 100, 2500 or 20000 by level unless given: at most 5 % of the time.
        batch: "live": the loss of the step. "fixed": always that of the first batch that was seen, so that curves compare over time.
        loss_fn: `(module, batch) -> loss` in the place of `training_step`; the batch is then fixed.
        output_module: The layer whose output goes into the loss, where that is none of torch's.
        match: Parameters to differentiate by: globs, `re:REGEX`, `type:LAYERCLASS`.
        exclude: The same, taken away.
        per_site: Scalars of single parameters: `True`, `False`, or "auto": if there are at most 100.
        seed: Of the random vectors.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; "default" warns where products with the Hessian are wrong.
        max_overhead: Share of training time that it may take, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is another word; when training starts: a pattern fits nothing, or the loss cannot be seen; the message says
            what to do.

    Example:
        >>> CurvatureMonitor("light").recorders[0].quantities[3:]
        ['batch_sharpness', 'batch_sharpness_over_threshold']
    """
    chosen: dict[str, Any] = {"batch": batch, "loss_fn": loss_fn, "output_module": output_module, "match": match, "exclude": exclude}
    source = Curvature(level, operators, top_k=top_k, **chosen)
    schedule = _schedule(every_n_steps, max_overhead, source.effort.every)
    probe = Probe(source.name, source, [quantity.name for quantity in source.quantities], schedule)
    return Monitor([probe], per_site=per_site, seed=seed, alerts=alerts, name=name, label="curvature")


def NTKMonitor(
    match: str | Sequence[str] | None = None,
    kernel: KernelName = "class_summed",
    num_examples: int = 64,
    num_projections: int = 16,
    top_k: int = 3,
    every_n_steps: int | None = None,
    output_module: str | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    exclude: str | Sequence[str] | None = None,
    per_site: bool | Literal["auto"] = "auto",
    seed: int = 0,
    name: str | None = None,
    *,
    alerts: Sequence[Alert] | Literal["default"] | None = None,
    max_overhead: float | None = None,
    num_outputs: int | None = None,
    train_mode: bool = False,
) -> Monitor:
    """The tangent kernel on a kept batch: its size and rank, what it shares with the labels, and how fast it turns.

    The first batch seen is kept, and run through `training_step` again after due steps, in eval mode, with everything put back that it
    changes; the Jacobian is never formed. A kernel that takes at most 128 pairs of products with it (examples times outputs; examples alone
    for the sum of the outputs) is exact, others are estimated, with errors.

    A sample is worth tens to hundreds of training steps, which is why the cadences are long.

    Memory that stays: twice `num_projections` times the outputs looked at, twice `top_k` modes; all of it is in the checkpoint, with the
    kept batch if that is a plain nest of tensors, numbers and words and there is one process. Otherwise a run that is resumed begins with a
    new batch and a new start.

    Args:
        match: Parameters that the kernel is of: globs, `re:REGEX`, `type:LAYERCLASS`; all that are trained unless given.
        kernel: "class_summed": of examples, summed over the outputs; every product takes as many as there are outputs. "full": of all
            outputs. "sum_of_logits": of examples, for the sum of the outputs over the root of their number.
        num_examples: First examples of the batch, on each process.
        num_projections: For sums and comparisons, and random vectors for the parameters' own kernels; at least 4.
        top_k: Modes that are followed.
        every_n_steps: Cadence, in optimizer steps; 2000 unless given, 5000 for the class-summed kernel.
        output_module: The layer whose output goes into the loss, where that is none of torch's; nothing is then known of labels.
        loss_fn: `(module, batch) -> loss` in the place of `training_step`.
        exclude: As `match`, taken away.
        per_site: Scalars of single parameters: `True`, `False`, or "auto": if there are at most 100.
        seed: Of the random vectors.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; there are none by default.
        max_overhead: Share of training time that it may take, 0.01 for 1 %: a `Budget` chooses the cadence.
        num_outputs: Columns of the outputs to look at, drawn where there are more; 256 unless given, 10 of the class-summed kernel.
        train_mode: Run the module as in training instead.

    Raises:
        ValueError: An option is another word or number; when training starts: a pattern fits nothing, or the step cannot be run again; the
            message says what to do.

    Example:
        >>> NTKMonitor(name="lora", match="*lora*").recorders[0].quantities[:2]
        ['lora_ntk_lambda_max', 'lora_ntk_lambda_2']
    """
    chosen: dict[str, Any] = {"match": match, "exclude": exclude, "output_module": output_module, "loss_fn": loss_fn, "seed": seed}
    counts: dict[str, Any] = {"num_examples": num_examples, "num_projections": num_projections, "top_k": top_k, "num_outputs": num_outputs}
    source = TangentKernel(kernel, train_mode=train_mode, **counts, **chosen)
    probe = Probe(
        source.name, source, [quantity.name for quantity in source.quantities], _schedule(every_n_steps, max_overhead, source.every)
    )
    return Monitor([probe], per_site=per_site, seed=seed, alerts=alerts, name=name, label="ntk")


def MultifractalMonitor(
    mode: Literal["rank", "neuromfa"] = "rank",
    every_n_steps: int | None = None,
    match: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    max_neurons: int | None = None,
    per_site: bool | Literal["auto"] = "auto",
    seed: int = 0,
    name: str | None = None,
    *,
    alerts: Sequence[Alert] | Literal["default"] | None = "default",
    heads: bool = False,
    views: Mapping[str, str | View] | None = None,
    threshold: float | None = THRESHOLD,
    num_repeats: int = 10,
    max_overhead: float | None = None,
) -> Monitor:
    """How unlike each other the neurons of a model become: multifractal statistics of its weights, beside what chance gives.

    It reads weights, before the step, and nothing else.

    Args:
        mode: "rank": every matrix in both directions, free of scale and of a choice of distance. "neuromfa": the whole model as one network
            by the published recipe, beside shuffled and Gaussian weights, with the degree of emergence.
        every_n_steps: Cadence, in optimizer steps; 500 unless given.
        match: Parameters to watch: globs, `re:REGEX`, `type:LAYERCLASS`; all matrices unless given, for "neuromfa" but embeddings.
        exclude: The same, taken away.
        max_neurons: Neurons that are looked at, per matrix or layer, the same at every sample; all unless given. "neuromfa" was published
            with 32.
        per_site: Scalars of single sites: `True`, `False`, or "auto": if there are at most 100.
        seed: Of the neurons that are drawn, and of the nulls.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; there are none by default.
        heads: Of "rank": split attention weights by head.
        views: Your own einops patterns by parameter name (glob), as for `RankMonitor`.
        threshold: Of "neuromfa": longest edge `1 / |w|` that is kept; None takes three over the root mean square of the first weights seen.
        num_repeats: Of "neuromfa" with `max_neurons`: samples of neurons that are averaged over.
        max_overhead: Share of training time that it may take, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is another word, out of its range, or of the other mode; when training starts: a pattern fits nothing.

    Example:
        >>> MultifractalMonitor().recorders[0].quantities[:3]
        ['multifractal_dispersion', 'multifractal_dispersion_chance', 'multifractal_alpha0']
    """
    of_both: dict[str, Any] = {"match": match, "exclude": exclude, "max_neurons": max_neurons, "views": views, "seed": seed}
    if mode not in MODES:
        raise ValueError(f"MultifractalMonitor(mode={mode!r}): one of {list(MODES)}")
    if mode == "rank" and (threshold, num_repeats) != (THRESHOLD, 10):
        raise ValueError(f"threshold={threshold} and num_repeats={num_repeats} are of mode='neuromfa': mode='rank' has no edge lengths")
    if mode == "neuromfa" and heads:
        raise ValueError("heads=True is of mode='rank': mode='neuromfa' has one chain of whole layers")
    whole: dict[str, Any] = {"threshold": threshold, "num_repeats": num_repeats}
    source = Multifractal(heads=heads, **of_both) if mode == "rank" else NeuroMFA(**whole, **of_both)
    probe = Probe(source.name, source, [quantity.name for quantity in source.quantities], _schedule(every_n_steps, max_overhead, 500))
    return Monitor([probe], per_site=per_site, seed=seed, alerts=alerts, name=name, label=source.name)


def _schedule(every_n_steps: int | None, max_overhead: float | None, default: int = 50) -> Every | Budget:
    if max_overhead is None:
        return Every(default if every_n_steps is None else every_n_steps)
    if every_n_steps is not None:
        raise ValueError(f"every_n_steps={every_n_steps} and max_overhead={max_overhead}: one of them, for the budget chooses the cadence")
    return Budget(max_overhead)


def _sequence(names: str | Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names
