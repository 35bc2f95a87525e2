"""A training as monitors see it, whoever runs its loop: Lightning's Trainer, Fabric, plain torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lowrank.distributed.team import Team


class Training(ABC):
    """One training. Made anew for each moment, so that nothing here goes out of date.

    Attributes:
        module: The module in training, without wrappers.
        called: The same as users call it, with wrappers.
        optimizers: Those that step it.
        team: The processes that share the work.
        device: Where the module is.
        may_skip: An optimizer that calls no hook has skipped its step, as under a GradScaler.
        epoch: Number of the epoch, from 0 on; None where nobody counts them.
        schedulers: Of learning rates, where they are known.
        total_steps: How many steps the x-axis will have if nothing ends the run before; None where that is not known.
        may_save: There is a way to write checkpoints.
    """

    module: nn.Module
    called: Any
    optimizers: Sequence[Optimizer]
    team: Team
    device: torch.device
    may_skip: bool = False
    epoch: int | None = None
    schedulers: Sequence[Any] = ()
    total_steps: int | None = None
    may_save: bool = True

    @property
    @abstractmethod
    def step(self) -> int:
        """Batches so far that ended in an optimizer step: the x-axis of all curves."""

    @property
    @abstractmethod
    def loggers(self) -> Sequence[Any]:
        """Loggers that this process writes to; none on any process but the first."""

    @property
    @abstractmethod
    def folder(self) -> str:
        """The folder for files of this run."""

    def loss_scale(self) -> Tensor | float:
        """Factor that the loss has been multiplied by before its backward pass."""
        return 1.0

    def gradient_scale(self, optimizer: Optimizer) -> Tensor | None:
        """Factor that gradients still carry, None for 1: fused optimizers unscale inside their step."""
        return None

    def mirror(self, scalars: Mapping[str, float]) -> None:
        """Show scalars to whatever else watches the training, such as checkpointing and early stopping."""
        return

    @abstractmethod
    def stop(self) -> None:
        """End the training after this batch; called by all processes."""

    @abstractmethod
    def save_checkpoint(self, path: str) -> None:
        """Write a checkpoint; called by all processes."""

    @property
    def step_function(self) -> Any:
        """The user's own training step, None where there is none."""
        return None

    def refuse_rerun(self) -> None:
        """Refuse a training whose step cannot be run again.

        Raises:
            ValueError: With the reason.
        """
        raise ValueError("there is no training_step to run again")

    def rerun(self, batch: Any, index: int) -> Any:
        """The result of the user's own training step for a batch."""
        raise NotImplementedError

    def precision(self) -> AbstractContextManager[Any]:
        """Context in which the training's forward passes run, such as autocast."""
        return nullcontext()

    def muted(self, snapshot: Any) -> AbstractContextManager[Any]:
        """Context of a rerun, in which nothing reaches loggers or callbacks of the training.

        Args:
            snapshot: Has `attributes_of(thing)`, which puts the attributes of a thing back when the rerun is over.
        """
        return nullcontext()

    def no_live_graph(self) -> str | None:
        """Why a look at the live graph of a loss would leave a trace, None where it would not."""
        return None


def device_of(module: nn.Module) -> torch.device:
    """Device of the first parameter, or buffer; the CPU where there is neither."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
