"""The base of all methods: callbacks that act on a training and report on it as monitors do."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_lowrank.measuring.number_source import Detail, NumberSource
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.schedules import Every
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.report import Style
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of
from lightning_lowrank.watching.trainer import HIDING, TrainerTraining, beside
from lightning_lowrank.watching.watch import Watch


def refuse_finetuning(trainer: L.Trainer, name: str, instead: str) -> None:
    """Refuse callbacks that freeze and unfreeze, for methods that do so as well.

    Raises:
        ValueError: There is one. The message names it and ends with an alternative.
    """
    for callback in beside(trainer):
        if isinstance(callback, BaseFinetuning):
            raise ValueError(
                f"{name} and {type(callback).__name__} both decide what is frozen; use only one, and {instead}"
            )


class Act(ABC):
    """What a method does to a training.

    Attributes:
        name: Name of the method, in messages.
        structural: Whether it changes the structure of the module, in `prepare`.
        warn: Warns of a failure; each kind once.
        say: Prints a message.
        not_sharded: Why it cannot act on parameters in shards.
    """

    name: str
    not_sharded: str = "no process holds a whole parameter"
    structural: bool = False
    warn: Callable[[str], None] = staticmethod(lambda message: None)
    say: Callable[[str], None] = staticmethod(lambda message: None)

    def prepare(self, module: nn.Module, *, fresh: bool = True) -> None:
        """Create the structure to train, before there are optimizers. What exists already does not change.

        Args:
            fresh: Set its values now; otherwise they come from a checkpoint, or `begin` sets them.

        Raises:
            ValueError: The options cannot be met; nothing has changed.
        """

    def batch_begins(self, training: Training) -> None:
        """Before each batch."""

    def gradients_final(self, training: Training, optimizer: Optimizer) -> None:
        """Gradients are synchronised, unscaled and accumulated, but not yet clipped; no monitor has read them."""

    def batch_over(self, training: Training) -> None:
        """After each batch, when all monitors have read it."""

    def epoch_over(self, training: Training) -> None:
        """After each epoch, if epochs are counted."""

    @abstractmethod
    def begin(self, training: Training) -> str:
        """Start to act. A resumed run continues where it stopped if its state was loaded.

        Returns:
            A message about what it acts on.

        Raises:
            ValueError: The options cannot be met; nothing has changed.
        """

    @abstractmethod
    def end(self) -> None:
        """Restore everything, in whatever state the training is. May be called more than once."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State that must survive a restart: plain tensors and numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state for the next `begin`."""

    @abstractmethod
    def forget(self) -> None:
        """The next `begin` does not continue a run."""


class ActingWatch(Watch):
    """Watches a training that a method acts on."""

    def __init__(self, act: Act, probes: Sequence[Probe], style: Style, **options: Any) -> None:
        super().__init__(probes, style, **options)
        self._act = act
        act.warn, act.say = self.journal.warn_once, self.journal.info_once

    @property
    def rests(self) -> bool:
        """Never: it acts at every step."""
        return False

    def begins(self, training: Training) -> None:
        """Start to act, then choose what to report."""
        refuse_sharded(self._act, training)
        self.journal.info_once(self._act.begin(training))
        super().begins(training)

    def batch_begins(self, training: Training, batch: Any, index: int) -> None:
        """Act before the batch, then ask the schedules."""
        self._act.batch_begins(training)
        super().batch_begins(training, batch, index)

    def gradients_final(self, training: Training, optimizer: Optimizer) -> None:
        """Act on gradients, then read them."""
        self._act.gradients_final(training, optimizer)
        super().gradients_final(training, optimizer)

    def batch_over(self, training: Training) -> None:
        """Report, then act between two batches."""
        super().batch_over(training)
        self._act.batch_over(training)

    def ends(self) -> None:
        """Restore everything."""
        try:
            super().ends()
        finally:
            self._act.end()

    def forget_resumed(self) -> None:
        """The next run does not continue this one."""
        super().forget_resumed()
        self._act.forget()

    def state_dict(self) -> dict[str, Any]:
        """Also the state of the method."""
        return super().state_dict() | {"act": self._act.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also load the state of the method, whatever is measured."""
        self._act.load_state_dict(state["act"])
        super().load_state_dict(state)


class Method(Monitor):
    """A callback that acts on a training. Resuming is exact, and everything is restored when the training is over.

    Args:
        act: The act on the training.
        source: The source of its reports.
        every_n_steps: Optimizer steps between two reports.
        detail: What loggers get: "core", "standard" or "all".
        per_site: Curves of single matrices: `True`, `False`, or "auto".
        seed: Seed of random draws.
        name: Prefix of all tags.
    """

    def __init__(
        self,
        act: Act,
        source: NumberSource,
        every_n_steps: int,
        *,
        detail: Detail,
        per_site: bool | Literal["auto"],
        seed: int,
        name: str | None,
    ) -> None:
        self._act = act
        schedule = cadence(every_n_steps, None, every_n_steps)
        assert isinstance(schedule, Every)
        super().__init__(probe_of(source, schedule), detail=detail, per_site=per_site, seed=seed, name=name)

    def __getstate__(self) -> dict[str, Any]:
        """Without the module's `log`, which Lightning hangs on: a copy is of another training, and torch pickles no
        module with parametrizations.
        """
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    def _watch(self, probes: Sequence[Probe], style: Style, **options: Any) -> Watch:
        return ActingWatch(self._act, probes, style, **options)

    def refuse_double(self, other: Monitor) -> None:
        """Refuse a second method of the same kind; each would act on the result of the other.

        Raises:
            ValueError: There is a second one.
        """
        if isinstance(other, type(self)):
            raise ValueError(
                f"two {type(self).__name__} in one training, {self!r} and {other!r}; use one for everything"
            )
        super().refuse_double(other)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies that hide parameters or gradients, and a second method of the same kind."""
        hiding = next((cls.__name__ for cls in type(trainer.strategy).__mro__ if cls.__name__ in HIDING), None)
        if hiding is not None:
            raise ValueError(
                f"{type(self).__name__} cannot act under strategy {hiding}: {HIDING[hiding]}. Use one device, or "
                "'ddp' or one of its variants"
            )
        super().setup(trainer, pl_module, stage)
        if self._act.structural:
            # Layers that are made there would not exist yet; Lightning asks that it may be called twice. Whether a
            # checkpoint will be loaded is not known yet, in any stage.
            pl_module.configure_model()
            self._act.prepare(pl_module, fresh=False)

    def prepare(self, module: nn.Module) -> None:
        """Create the structure to train. In your own loop, call it before you create the optimizer.

        A Trainer does it in `setup`. Methods that change no structure do nothing.

        Raises:
            ValueError: The options cannot be met; nothing has changed.
        """
        self._act.prepare(module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Act between two epochs."""
        super().on_train_epoch_end(trainer, pl_module)
        self._act.epoch_over(TrainerTraining(trainer, pl_module))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to act, even if nothing is reported. Options that cannot be met are refused here, before training."""
        if trainer.barebones:
            training = TrainerTraining(trainer, pl_module)
            refuse_sharded(self._act, training)
            self._act.begin(training)
        else:
            super().on_fit_start(trainer, pl_module)


def refuse_sharded(act: Act, training: Training) -> None:
    """Refuse a model whose parameters are sharded over several processes.

    Raises:
        ValueError: A parameter is sharded.
    """
    sharded = next((key for key, p in training.module.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise ValueError(
            f"{act.name} cannot act on {sharded!r}, which is sharded over several processes (FSDP2, tensor "
            f"parallel): {act.not_sharded}. Use one device, or 'ddp' or one of its variants"
        )
