"""What a Trainer knows that measuring depends on: its processes, its GradScaler, strategies that hide the matrices."""

from typing import Any

import lightning as L
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from lightning_lowrank.distributed.team import Team

# By name, since there are two packages of them, and not all are installed.
HIDING = {
    "FSDPStrategy": "it keeps matrices as flat pieces without rows and columns",
    "DeepSpeedStrategy": "its engine keeps gradients to itself",
    "XLAFSDPStrategy": "it keeps matrices as flat pieces without rows and columns",
}
INSTEAD = (
    "'ddp' and its variants, or ModelParallelStrategy with fully_shard (FSDP2) and "
    "parallelize_module in configure_model"
)


def refuse_hidden(trainer: L.Trainer, module: nn.Module) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: The strategy, or a wrapper inside the module, hides the matrices; the message says what works.
    """
    names = {cls.__name__ for cls in type(trainer.strategy).__mro__} & HIDING.keys()
    for name in names:
        raise ValueError(f"strategy {name} cannot be watched: {HIDING[name]}; what works is {INSTEAD}")
    for path, part in module.named_modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{path!r} is wrapped in FSDP1 and cannot be watched: {HIDING['FSDPStrategy']}; what works is {INSTEAD}"
            )


def team_of(trainer: L.Trainer) -> Team:
    """The processes of this training: there may be others that train something else."""
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return Team()
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    sees_data = mesh is None or mesh.get_local_rank("tensor_parallel") == 0
    return Team(trainer.global_rank, trainer.world_size, sees_data)


def may_skip(trainer: L.Trainer) -> bool:
    """Whether there is a GradScaler that may skip steps."""
    return _scaler(trainer) is not None


def loss_scale(trainer: L.Trainer, module: L.LightningModule) -> Tensor | float:
    """What the loss has been multiplied by before its backward pass."""
    scaler = _scaler(trainer)
    share = 1 / trainer.accumulate_grad_batches if module.automatic_optimization else 1.0
    return share if scaler is None else share * scaler._get_scale_async()


def scale_of(trainer: L.Trainer, optimizer: Optimizer) -> Tensor | None:
    """What gradients are still multiplied by: fused optimizers unscale inside their step."""
    scaler, fused = _scaler(trainer), getattr(optimizer, "_step_supports_amp_scaling", False)
    # get_scale() would wait for the device.
    return scaler._get_scale_async() if scaler is not None and fused else None


def _scaler(trainer: L.Trainer) -> Any:
    """The GradScaler in use, None without."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None
