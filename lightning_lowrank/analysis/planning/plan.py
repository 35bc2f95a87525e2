"""The cost of watching a model, before it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lowrank.analysis.architectures import call
from lightning_lowrank.analysis.planning.counting import Counting, Moving, counted
from lightning_lowrank.analysis.planning.devices import devices
from lightning_lowrank.analysis.planning.rehearsal import META, Costs, rehearsed
from lightning_lowrank.monitors.rank import OF_PARAMETERS, RankMonitor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
Dtype = Literal["fp32", "bf16", "fp16", "fp64"]
# Backward passes take twice what a forward pass does.
PASSES = 3
# What all functions of a transformer read and write of activations, over what its products do of them.
ACTIVATIONS = 2.5


@dataclass(frozen=True)
class Plan:
    """The cost of watching a model.

    Attributes:
        what: The model as requested.
        num_parameters: Number of entries of its parameters.
        num_tensors: Number of its parameters.
        num_devices: Number of processes that share it.
        dtype: Dtype of weights and gradients.
        every_n_steps: Cadence in optimizer steps.
        costs: Costs of a sample.
        step_flops: Flops of a training step on each device; None if unknown.
        step_bytes: Bytes that functions of torch read and write in it; None if unknown.
        device: Class of devices.
        sample_ms: Milliseconds of a sample without communication; None if the class was not measured.
        step_ms: Milliseconds of a training step; None if unknown.
    """

    what: str
    num_parameters: int
    num_tensors: int
    num_devices: int
    dtype: str
    every_n_steps: int
    costs: Costs
    step_flops: float | None
    step_bytes: float | None
    device: str
    sample_ms: float | None
    step_ms: float | None

    @property
    def in_steps(self) -> float | None:
        """Flops of a sample divided by those of a training step; None if these are unknown."""
        return self.costs.flops.total() / self.step_flops if self.step_flops else None

    @property
    def share(self) -> float | None:
        """Increase of training time in percent; None if it is unknown, or if processes must communicate."""
        if self.sample_ms is None or not self.step_ms or self.num_devices > 1:
            return None
        return 100 * self.sample_ms / (self.every_n_steps * self.step_ms)


def planned(
    function: str,
    *,
    num_devices: int = 1,
    dtype: Dtype = "fp32",
    tokens_per_step: int | None = None,
    step_ms: float | None = None,
    device: str = "cpu",
    every_n_steps: int = 50,
    sources: Sequence[str] = ("gradients", "weights", "updates"),
) -> Plan:
    """The cost of `RankMonitor` for a model, which is created on meta tensors and takes no step.

    Args:
        function: `module:function` without arguments that returns an `nn.Module`, or a tuple of one and the inputs of
            its forward pass. The inputs are used to count the flops of a step.
        num_devices: Number of processes over which FSDP2 shards the model.
        dtype: Dtype of weights and gradients.
        tokens_per_step: Rows that each device multiplies by every matrix in a step, if there are no inputs.
        step_ms: Milliseconds of a training step, if known.
        device: A class of devices. Without a measurement of it there are flops and bytes, but no times.
        every_n_steps: Cadence in optimizer steps.
        sources: Sources of `RankMonitor` that read parameters.

    Raises:
        ValueError: The function does not exist or returns no module, a number is below 1, or a source is unknown or
            does not read parameters. Also if there is no matrix, or if this process is one of several.
    """
    _refuse(num_devices, tokens_per_step, step_ms, every_n_steps, sources)
    module, inputs = _made(function)
    return plan_of(
        module,
        inputs,
        device,
        what=function,
        num_devices=num_devices,
        dtype=dtype,
        tokens_per_step=tokens_per_step,
        step_ms=step_ms,
        every_n_steps=every_n_steps,
        sources=sources,
    )


def plan_of(
    module: nn.Module,
    inputs: Sequence[Any],
    device: str,
    *,
    what: str = "",
    num_devices: int = 1,
    dtype: Dtype = "fp32",
    tokens_per_step: int | None = None,
    step_ms: float | None = None,
    every_n_steps: int = 50,
    sources: Sequence[str] = ("gradients", "weights", "updates"),
) -> Plan:
    """The same for a module, which is moved to the meta device."""
    module.to(device=META, dtype=DTYPES[dtype])
    parameters = list(module.parameters())
    num_parameters, num_tensors = sum(p.numel() for p in parameters), len(parameters)
    flops, moved = _of_inputs(module, inputs) if inputs else _of_tokens(module, tokens_per_step)
    costs = rehearsed(module, RankMonitor(sources, every_n_steps=every_n_steps), num_devices)
    known = devices().get(device)
    if step_ms is None and known is not None and flops is not None and moved is not None and num_devices == 1:
        step_ms = known.step(flops, moved, num_tensors, num_parameters)
    return Plan(
        what,
        num_parameters,
        num_tensors,
        num_devices,
        dtype,
        every_n_steps,
        costs,
        flops,
        moved,
        device,
        None if known is None else known.sample(costs),
        step_ms,
    )


def _refuse(
    num_devices: int, tokens: int | None, step_ms: float | None, every_n_steps: int, sources: Sequence[str]
) -> None:
    counts = {"devices": num_devices, "tokens_per_step": tokens, "step_ms": step_ms, "every_n_steps": every_n_steps}
    wrong = {name: value for name, value in counts.items() if value is not None and not value > 0}
    if wrong:
        raise ValueError(f"{wrong} must be a number above 0")
    unknown = [source for source in sources if source not in OF_PARAMETERS]
    if unknown or not sources:
        raise ValueError(
            f"sources={list(sources)}: the cost of {unknown} is unknown without a batch; choose from "
            f"{list(OF_PARAMETERS)}"
        )


def _made(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module, made on the meta device, and inputs of its forward pass."""
    given = call(name)
    module, *inputs = given if isinstance(given, tuple) else (given,)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{name} returned a {type(module).__name__}; expected an nn.Module, or a tuple of one and its inputs"
        )
    return module, tuple(inputs)


def _of_inputs(module: nn.Module, inputs: Sequence[Any]) -> tuple[float, float]:
    """Flops and bytes of a forward and a backward pass of one device."""
    on_meta = [value.to(META) if isinstance(value, Tensor) else value for value in inputs]
    with counted(Counting()) as counting, Moving() as moving:
        try:
            module(*on_meta)
        except Exception as error:  # the user's own code
            shapes = [list(value.shape) if isinstance(value, Tensor) else value for value in inputs]
            why = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"{type(module).__name__} fails on the inputs {shapes}: {type(error).__name__}: {why}"
            ) from error
    return float(PASSES * counting.flops.total()), float(PASSES * moving.bytes)


def _of_tokens(module: nn.Module, tokens: int | None) -> tuple[float, float] | tuple[None, None]:
    """The same of a transformer that multiplies that many rows by every matrix; None without a number."""
    if tokens is None:
        return None, None
    looked_up = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in module.parameters() if p.ndim > 1 and id(p) not in looked_up]
    flops = sum(2 * tokens * p.numel() for p in matrices)
    moved = sum(p.itemsize * (p.numel() + ACTIVATIONS * tokens * (p.shape[0] + p[0].numel())) for p in matrices)
    return float(PASSES * flops), float(PASSES * moved)
