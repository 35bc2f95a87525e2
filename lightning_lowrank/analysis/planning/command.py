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
        function: `module:function` that gives an nn.Module, or a tuple of one and its inputs.
        devices: That FSDP2 shards it over.
        dtype: Of weights and gradients.
        tokens_per_step: Of each device.
        step_ms: Of a training step, if known.
        device_class: Times are of those that were measured.
        every_n_steps: Cadence.
        sources: Of `RankMonitor`; its own unless given.
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
