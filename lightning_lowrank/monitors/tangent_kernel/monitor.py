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
    """The neural tangent kernel on a kept batch: its size and rank, its alignment with the labels, and how fast it
    changes.

    The first batch that has a kernel is kept. After each step with a sample it is run through `training_step` again in
    eval mode, and all state that this changes is restored. The Jacobian is never stored. A kernel is exact if it needs
    at most 128 pairs of products: one for each example and output, or one for each example for the sum of the outputs.
    The class-summed kernel is also exact if it has at most 512 rows, each row depends on one example, and all layers
    are linear, convolutions or normalisations. Other kernels are estimated, with errors.

    A sample costs as much as tens to hundreds of training steps, so the default cadences are long.

    Memory between samples: twice `num_projections` times the used outputs, and twice `top_k` modes. An exact kernel
    keeps four times the square of its rows instead of the projections. Checkpoints contain all of it. With a single
    process they also contain the kept batch, if that consists of tensors, numbers and strings in plain containers.
    Otherwise a resumed run begins with a new batch and a new start.

    Args:
        match: Parameters for the kernel: globs, `re:REGEX`, `type:LAYERCLASS`; all trained ones by default.
        kernel: "class_summed": one row per example, summed over the outputs; every product takes as many products as
            there are outputs. "full": one row per output of each example. "sum_of_logits": one row per example, for the
            sum of the outputs divided by the square root of their number.
        num_examples: Number of examples to keep, the first ones of the batch, on each process.
        num_projections: Number of random projections for sums and comparisons, and of random vectors for the kernels of
            single parameters; at least 4.
        top_k: Number of modes to measure.
        every_n_steps: Cadence in optimizer steps; default 3000, or 4000 for the class-summed kernel.
        output_module: The layer whose output goes into the loss, if the loss is not one of torch's functions.
            Quantities that need labels are then missing.
        loss_fn: `(module, batch) -> loss`, used instead of `training_step`.
        exclude: Patterns of what to leave out, as for `match`.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single parameters: `True`, `False`, or "auto" (from "standard" on, if there are at most
            100).
        seed: Seed for the random vectors.
        name: Prefix of all tags.
        alerts: Alert rules; none by default.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.
        num_outputs: Number of columns of the outputs to use, a random choice if there are more; default 256, or 10 for
            the class-summed kernel.
        train_mode: Whether to run the module in training mode instead.

    Raises:
        ValueError: An option is unknown or out of range; when training starts: a pattern matches nothing, or the step
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
