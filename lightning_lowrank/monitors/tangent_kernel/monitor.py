"""`NTKMonitor`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.monitors.tangent_kernel.kernels import KernelName
from lightning_lowrank.monitors.tangent_kernel.source import TangentKernel
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class NTKMonitor(Monitor):
    """The tangent kernel on a kept batch: its size and rank, what it shares with the labels, and how fast it turns.

    The first batch seen that has a kernel is kept, and run through `training_step` again after due steps, in eval mode,
    with everything put back that it changes; the Jacobian is never formed. A kernel that takes at most 128 pairs of
    products with it (examples times outputs; examples alone for the sum of the outputs) is exact, others are estimated,
    with errors.

    A sample is worth tens to hundreds of training steps, which is why the cadences are long.

    Memory that stays: twice `num_projections` times the outputs looked at, twice `top_k` modes; all of it is in the
    checkpoint, with the kept batch if that is a plain nest of tensors, numbers and words and there is one process.
    Otherwise a run that is resumed begins with a new batch and a new start.

    Args:
        match: Parameters that the kernel is of: globs, `re:REGEX`, `type:LAYERCLASS`; all that are trained unless
            given.
        kernel: "class_summed": of examples, summed over the outputs; every product takes as many as there are outputs.
            "full": of all outputs. "sum_of_logits": of examples, for the sum of the outputs over the root of their
            number.
        num_examples: First examples of the batch, on each process.
        num_projections: For sums and comparisons, and random vectors for the parameters' own kernels; at least 4.
        top_k: Modes that are followed.
        every_n_steps: Cadence, in optimizer steps; 3000 unless given, 4000 for the class-summed kernel.
        output_module: The layer whose output goes into the loss, where that is none of torch's; nothing is then known
            of labels.
        loss_fn: `(module, batch) -> loss` in the place of `training_step`.
        exclude: As `match`, taken away.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single parameters: `True`, `False`, or "auto": from "standard" on, if there are at
            most 100.
        seed: Of the random vectors.
        name: Prefix of all tags.
        alerts: Rules that say when to warn; there are none by default.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.
        num_outputs: Columns of the outputs to look at, drawn where there are more; 256 unless given, 10 of the
            class-summed kernel.
        train_mode: Run the module as in training instead.

    Raises:
        ValueError: An option is another word or number; when training starts: a pattern fits nothing, or the step
            cannot be run again; the message says what to do.

    Examples:
        >>> NTKMonitor(name="lora", match="*lora*").recorders[0].quantities[:2]
        ['lora_ntk_lambda_max', 'lora_ntk_lambda_2']
    """

    word = "ntk"

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """None."""
        return []

    def __init__(
        self,
        match: str | Sequence[str] | None = None,
        kernel: KernelName = "class_summed",
        num_examples: int = 64,
        num_projections: int = 16,
        top_k: int = 3,
        every_n_steps: int | None = None,
        output_module: str | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        exclude: str | Sequence[str] | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        seed: int = 0,
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = None,
        max_overhead: float | None = None,
        num_outputs: int | None = None,
        train_mode: bool = False,
    ) -> None:
        chosen: dict[str, Any] = {
            "match": match,
            "exclude": exclude,
            "output_module": output_module,
            "loss_fn": loss_fn,
            "seed": seed,
        }
        counts: dict[str, Any] = {
            "num_examples": num_examples,
            "num_projections": num_projections,
            "top_k": top_k,
            "num_outputs": num_outputs,
        }
        source = TangentKernel(kernel, train_mode=train_mode, **counts, **chosen)
        schedule = cadence(every_n_steps, max_overhead, source.every)
        super().__init__(
            probe_of(source, schedule), detail=detail, per_site=per_site, seed=seed, alerts=alerts, name=name
        )
