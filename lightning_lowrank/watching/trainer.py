"""A training that Lightning's Trainer runs."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.models.training import Training

# By name, since there are two packages of them, and not all are installed.
HIDING = {
    "FSDPStrategy": "it stores matrices as flat pieces without rows and columns",
    "DeepSpeedStrategy": "its engine hides gradients",
    "XLAFSDPStrategy": "it stores matrices as flat pieces without rows and columns",
}
INSTEAD = (
    "'ddp' and its variants, or ModelParallelStrategy with fully_shard (FSDP2) and "
    "parallelize_module in configure_model"
)


class TrainerTraining(Training):
    """A training as a Trainer runs it; reads the Trainer's own attributes and keeps nothing."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._trainer = trainer
        self.module = self.called = module

    @property
    def optimizers(self) -> list[Optimizer]:  # type: ignore[override]
        """The Trainer's."""
        return self._trainer.optimizers

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device of the module."""
        return self.module.device  # type: ignore[return-value]

    @property
    def team(self) -> Team:  # type: ignore[override]
        """The processes of this training: there may be others that train something else."""
        trainer = self._trainer
        if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return Team()
        mesh = getattr(trainer.strategy, "_device_mesh", None)
        sees_data = mesh is None or mesh.get_local_rank("tensor_parallel") == 0
        return Team(trainer.global_rank, trainer.world_size, sees_data)

    @property
    def step(self) -> int:
        """The x-axis of Lightning's own logging.

        Private, but what `self.log` and Lightning's monitors use; `global_step` counts every optimizer in manual
        optimization.
        """
        loop: Any = self._trainer.fit_loop.epoch_loop
        return int(loop._batches_that_stepped if hasattr(loop, "_batches_that_stepped") else self._trainer.global_step)

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """Number of the epoch."""
        return self._trainer.current_epoch

    @property
    def schedulers(self) -> list[Any]:  # type: ignore[override]
        """The Trainer's."""
        return [config.scheduler for config in self._trainer.lr_scheduler_configs]

    @property
    def total_steps(self) -> int | None:  # type: ignore[override]
        """From the limits of the Trainer and the length of its loader, which is known when training starts.

        Not `estimated_stepping_batches`, which sets what it asks. In manual optimization `max_steps` counts every
        optimizer, and the x-axis does not.
        """
        trainer, automatic = self._trainer, self.module.automatic_optimization
        batches = trainer.num_training_batches / (trainer.accumulate_grad_batches if automatic else 1)
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
        by_steps = trainer.max_steps if automatic and trainer.max_steps >= 0 else math.inf
        total = min(math.ceil(batches) * epochs if math.isfinite(batches) else math.inf, by_steps)
        return int(total) if math.isfinite(total) else None

    @property
    def loggers(self) -> list[Logger]:
        """The Trainer's, on its first process."""
        return self._trainer.loggers if self._trainer.is_global_zero else []

    @property
    def folder(self) -> str:
        """The folder of the first logger, or the Trainer's root."""
        return str(self._trainer.log_dir or self._trainer.default_root_dir)

    @property
    def may_skip(self) -> bool:  # type: ignore[override]
        """Whether there is a GradScaler."""
        return self._scaler is not None

    def loss_scale(self) -> Tensor | float:
        """Share of accumulation, times the GradScaler's factor."""
        share = 1 / self._trainer.accumulate_grad_batches if self.module.automatic_optimization else 1.0
        return share if self._scaler is None else share * self._scaler._get_scale_async()

    def gradient_scale(self, optimizer: Optimizer) -> Tensor | None:
        """The GradScaler's factor, where the optimizer unscales inside its step."""
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        # get_scale() would wait for the device.
        return self._scaler._get_scale_async() if self._scaler is not None and fused else None

    def mirror(self, scalars: Mapping[str, float]) -> None:
        """Show scalars to ModelCheckpoint and EarlyStopping."""
        self._trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})

    def forget(self, start: str) -> None:
        """Take scalars back before a launcher that has spawned or forked this process sends them home.

        It does so through a pipe of 64 KiB that nobody reads until this process has ended, which it then never does.

        Args:
            start: Of their tags.
        """
        metrics = self._trainer.callback_metrics
        if hasattr(self._trainer.strategy.launcher, "get_extra_results"):
            for key in [key for key in metrics if key.startswith(start)]:
                del metrics[key]

    def stop(self) -> None:
        """End the training after this batch, on all processes at the same one."""
        trainer = self._trainer
        trainer.should_stop = trainer.should_stop or trainer.strategy.reduce_boolean_decision(True, all=False)

    def save_checkpoint(self, path: str) -> None:
        """With the state of all callbacks."""
        try:
            self._trainer.save_checkpoint(path, weights_only=False)
        except Exception:
            # Only the first process writes: the others wait for it where it would have come to.
            self._trainer.strategy.barrier("Trainer.save_checkpoint")
            raise

    def refuse_rerun(self) -> None:
        """Refuse steps that would step optimizers, or take batches of their own.

        Raises:
            ValueError: With the reason.
        """
        if not self.module.automatic_optimization:
            raise ValueError("training_step cannot be run again: in manual optimization it steps optimizers")
        if "dataloader_iter" in inspect.signature(self.step_function).parameters:
            raise ValueError("training_step(dataloader_iter) cannot be run again: it takes its own batches")

    def rerun(self, batch: Any, index: int) -> Any:
        """The result of `training_step`."""
        return self.step_function(*[batch, index][: _num_arguments(self.step_function)])

    def precision(self) -> AbstractContextManager[Any]:
        """The context of Lightning's own training steps."""
        return self._trainer.precision_plugin.train_step_context()

    @contextmanager
    def muted(self, snapshot: Any) -> Iterator[None]:
        """Loggers are mute for the module, in `self.log` and through `self.logger`; the snapshot undoes it."""
        trainer = self._trainer
        snapshot.attributes_of(trainer)
        trainer.loggers = [cast(Any, Mute(logger)) for logger in trainer.loggers]
        for part in self.module.modules():
            if isinstance(part, L.LightningModule):
                # Not by setattr, which users override.
                vars(part).update(log=_nothing, log_dict=_nothing)
        yield

    def no_live_graph(self) -> str | None:
        """DDP with a static graph counts backward passes."""
        static = getattr(self._trainer.strategy, "_ddp_kwargs", {}).get("static_graph")
        return "DDP's static_graph=True, which counts backward passes" if static else None

    @property
    def step_function(self) -> Any:
        """`training_step`."""
        return self.module.training_step

    @property
    def _scaler(self) -> Any:
        """The GradScaler in use, None without."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None


class Mute:
    """A logger that says what it is called and where it writes, and writes nothing."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.experiment = DummyLogger().experiment

    # For `isinstance(self.logger, TensorBoardLogger)`.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._logger, name)
        return _nothing if callable(found) else found


def beside(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks of a Trainer, ours among them."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # it sets it, but not in its class
    return callbacks


def refuse_hidden(strategy: Any, module: nn.Module) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: The strategy, or a wrapper inside the module, hides the matrices; the message says what works.
    """
    hiding = next((cls.__name__ for cls in type(strategy).__mro__ if cls.__name__ in HIDING), None)
    if hiding is not None:
        raise ValueError(f"strategy {hiding} cannot be watched: {HIDING[hiding]}. Use {INSTEAD}")
    for path, part in module.named_modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{path!r} is wrapped in FSDP1 and cannot be watched: {HIDING['FSDPStrategy']}. Use {INSTEAD}"
            )


def _num_arguments(step: Callable[..., Any]) -> int:
    """How many of batch and its number it takes."""
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2
    return min(2, sum(p.kind is not p.VAR_KEYWORD for p in parameters))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what would be heard outside."""
