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
    """Print what `RankMonitor` will cost a model, on tensors without entries, without a step.

    Args:
        function: `module:function`, which returns an nn.Module, or a tuple of one and its inputs.
        devices: The number of devices over which FSDP2 shards the model.
        dtype: The dtype of weights and gradients.
        tokens_per_step: The number of tokens of each device in a training step.
        step_ms: The duration of a training step in milliseconds, if you know it.
        device_class: The class of devices to predict times for. Only "cpu" was measured.
        every_n_steps: The number of steps between two samples.
        sources: The sources to measure; by default those of `RankMonitor()`.
        json: Print all numbers, null where nothing was measured.

    Raises:
        ValueError: The function gives no module, it has no matrix, or an argument is out of range.
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
