"""`lightning-lowrank plan`."""

import json
import sys
from typing import Literal

import rich
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt


def parser() -> ArgumentParser:
    """What it takes."""
    asked = ArgumentParser(
        description="What RankMonitor will cost a model, on tensors without entries, without a step."
    )
    asked.add_argument(
        "function", type=str, help="module:function that gives an nn.Module, or a tuple of one and its inputs"
    )
    asked.add_argument("--devices", type=PositiveInt, default=1, help="that FSDP2 shards it over")
    asked.add_argument(
        "--dtype", type=Literal["fp32", "bf16", "fp16", "fp64"], default="fp32", help="of weights and gradients"
    )
    asked.add_argument("--tokens-per-step", type=PositiveInt | None, default=None, help="of each device")
    asked.add_argument("--step-ms", type=PositiveFloat | None, default=None, help="of a training step, if known")
    asked.add_argument("--device-class", type=str, default="cpu", help="times are of those that were measured")
    asked.add_argument("--every-n-steps", type=PositiveInt, default=50, help="cadence")
    asked.add_argument("--sources", type=list[str], default=["gradients", "weights", "updates"], help="of RankMonitor")
    asked.add_argument("--json", action="store_true", help="for a program, null where nothing was measured")
    return asked


def run(options: Namespace) -> None:
    """Print the plan, or say what is wrong and end."""
    # Here, so that tables of finished runs need no torch.
    from lightning_lowrank.analysis.planning.plan import planned
    from lightning_lowrank.analysis.planning.telling import plain, table_of

    try:
        found = planned(
            options.function,
            num_devices=options.devices,
            dtype=options.dtype,
            tokens_per_step=options.tokens_per_step,
            step_ms=options.step_ms,
            device=options.device_class,
            every_n_steps=options.every_n_steps,
            sources=options.sources,
        )
    except ValueError as error:
        sys.exit(f"lightning-lowrank plan: {error}")
    if options.json:
        sys.stdout.write(json.dumps(plain(found), indent=2, allow_nan=False) + "\n")
    else:
        rich.print(table_of(found))
