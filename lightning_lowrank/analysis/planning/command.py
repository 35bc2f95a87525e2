"""`lightning-lowrank plan`."""

from typing import Literal

from lightning_lowrank.analysis.planning.plan import planned
from lightning_lowrank.analysis.planning.telling import plain, table_of
from lightning_lowrank.analysis.showing import print_json, show


def plan(
    function: str,
    *,
    devices: int = 1,
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32",
    tokens_per_step: int | None = None,
    step_ms: float | None = None,
    device_class: str = "cpu",
    every_n_steps: int = 50,
    sources: list[str] | None = None,
    json: bool = False,
) -> None:
    """Print what `RankMonitor` will cost for a model, on meta tensors and without a training step.

    Args:
        function: `module:function` that returns an nn.Module, or a tuple of one and its inputs.
        devices: Number of devices over which FSDP2 shards it.
        dtype: Dtype of weights and gradients.
        tokens_per_step: Tokens of each device in a step.
        step_ms: Milliseconds of a training step, if known.
        device_class: Class of devices for the times; only "cpu" was measured.
        every_n_steps: Optimizer steps between two samples.
        sources: Sources of `RankMonitor`; by default its own.
        json: Print all numbers, null if nothing was measured.

    Raises:
        ValueError: The function returns no module, the module has no matrix, or an argument is out of range.
    """
    found = planned(
        function,
        num_devices=devices,
        dtype=dtype,
        tokens_per_step=tokens_per_step,
        step_ms=step_ms,
        device=device_class,
        every_n_steps=every_n_steps,
        sources=sources or ("gradients", "weights", "updates"),
    )
    if json:
        print_json(plain(found))
    else:
        show(table_of(found))
