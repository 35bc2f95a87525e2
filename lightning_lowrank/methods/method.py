"""What methods have in common: callbacks that act on a training, and report on it as monitors do."""

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
from lightning_lowrank.watching.trainer import HIDING, TrainerTraining
from lightning_lowrank.watching.watch import Watch


def beside(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks of a Trainer, ours among them."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # it sets it, but not in its class
    return callbacks


def refuse_finetuning(trainer: L.Trainer, name: str, instead: str) -> None:
    """Refuse callbacks that freeze and unfreeze, for methods that do so too.

    Raises:
        ValueError: There is one, named; the message ends with what to do instead.
    """
    for callback in beside(trainer):
        if isinstance(callback, BaseFinetuning):
            raise ValueError(f"{name} and {type(callback).__name__} both say what is frozen: take one, and {instead}")


class Act(ABC):
    """What a method does to a training.

    Attributes:
        name: Of the method, in messages.
        structural: It changes the structure of the module, in `prepare`.
        warn: Says what went wrong; each kind once.
        say: Says what it does.
        not_sharded: Why it cannot act on parameters in shards.
    """

    name: str
    not_sharded: str = "no process has a whole one"
    structural: bool = False
    warn: Callable[[str], None] = staticmethod(lambda message: None)
    say: Callable[[str], None] = staticmethod(lambda message: None)

    def prepare(self, module: nn.Module, *, fresh: bool = True) -> None:
        """Make the structure that is trained, before there are optimizers; what is there already is left as it is.

        Args:
            fresh: Give it its values now; otherwise they come from a checkpoint, or `begin` gives them.

        Raises:
            ValueError: What was asked for cannot be had; nothing was changed.
        """

    def batch_begins(self, training: Training) -> None:
        """Before each batch."""

    def gradients_final(self, training: Training, optimizer: Optimizer) -> None:
        """Gradients are synchronised, unscaled and accumulated, not yet clipped; nobody has read them."""

    def batch_over(self, training: Training) -> None:
        """After each batch, when everybody has read it."""

    def epoch_over(self, training: Training) -> None:
        """After each epoch, where somebody counts them."""

    @abstractmethod
    def begin(self, training: Training) -> str:
        """Act from now on; a run that was stopped goes on where it was, if its state was loaded.

        Returns:
            What to say: what it acts on.

        Raises:
            ValueError: What was asked for cannot be had; nothing was changed.
        """

    @abstractmethod
    def end(self) -> None:
        """Give everything back, in whatever state the training is. Called more than once."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart: plain tensors and numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep it for the next `begin`."""

    @abstractmethod
    def forget(self) -> None:
        """The next `begin` is no continuation."""


class ActingWatch(Watch):
    """A watch over a training that a method acts on."""

    def __init__(self, act: Act, probes: Sequence[Probe], style: Style, **options: Any) -> None:
        super().__init__(probes, style, **options)
        self._act = act
        act.warn, act.say = self.journal.warn_once, self.journal.info_once

    def begins(self, training: Training) -> None:
        """Act, then choose what to report on."""
        refuse_sharded(self._act, training)
        self.journal.info_once(self._act.begin(training))
        super().begins(training)

    def batch_begins(self, training: Training, batch: Any, index: int) -> None:
        """Act on what comes before a batch, then ask the schedules."""
        self._act.batch_begins(training)
        super().batch_begins(training, batch, index)

    def gradients_final(self, training: Training, optimizer: Optimizer) -> None:
        """Act on gradients, then read them."""
        self._act.gradients_final(training, optimizer)
        super().gradients_final(training, optimizer)

    def batch_over(self, training: Training) -> None:
        """Report, then act on what comes between two batches."""
        super().batch_over(training)
        self._act.batch_over(training)

    def ends(self) -> None:
        """Give everything back."""
        try:
            super().ends()
        finally:
            self._act.end()

    def forget_resumed(self) -> None:
        """Another run after this one is no continuation."""
        super().forget_resumed()
        self._act.forget()

    def state_dict(self) -> dict[str, Any]:
        """Also the method's own."""
        return super().state_dict() | {"act": self._act.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also the method's own, whatever was measured."""
        self._act.load_state_dict(state["act"])
        super().load_state_dict(state)


class Method(Monitor):
    """A callback that acts on a training: exactly resumed, and everything given back when the training is over.

    Args:
        act: What it does.
        source: What it reports.
        every_n_steps: Cadence of the reports, in optimizer steps.
        detail: What loggers get of them: "core", "standard" or "all".
        per_site: Scalars of single matrices: `True`, `False`, or "auto".
        seed: Of what is drawn.
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
        """Refuse a second one of its kind: each would take what the other left.

        Raises:
            ValueError: With what to do.
        """
        if isinstance(other, type(self)):
            raise ValueError(f"two {type(self).__name__} in one training, {self!r} and {other!r}: give one of them all")
        super().refuse_double(other)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies that keep parameters or gradients to themselves, and a second method of its kind."""
        hiding = next((cls.__name__ for cls in type(trainer.strategy).__mro__ if cls.__name__ in HIDING), None)
        if hiding is not None:
            raise ValueError(
                f"{type(self).__name__} cannot act under strategy {hiding}: {HIDING[hiding]}; what works is one "
                "device, or 'ddp' and its variants"
            )
        super().setup(trainer, pl_module, stage)
        if self._act.structural:
            # Layers that are made there would not exist yet; Lightning asks that it may be called twice. Whether a
            # checkpoint will be loaded is not known yet, in any stage.
            pl_module.configure_model()
            self._act.prepare(pl_module, fresh=False)

    def prepare(self, module: nn.Module) -> None:
        """Make the structure that is trained, for a loop of your own: before its optimizer is made.

        A Trainer does it in `setup`. Methods that change no structure do nothing.

        Raises:
            ValueError: What was asked for cannot be had; nothing was changed.
        """
        self._act.prepare(module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Act on what comes between two epochs."""
        super().on_train_epoch_end(trainer, pl_module)
        self._act.epoch_over(TrainerTraining(trainer, pl_module))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Act, also where nothing is reported; what cannot be had is refused here, before training."""
        if trainer.barebones:
            training = TrainerTraining(trainer, pl_module)
            refuse_sharded(self._act, training)
            self._act.begin(training)
        else:
            super().on_fit_start(trainer, pl_module)


def refuse_sharded(act: Act, training: Training) -> None:
    """Refuse a model whose parameters lie in shards on several processes.

    Raises:
        ValueError: With what works.
    """
    sharded = next((key for key, p in training.module.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise ValueError(
            f"{act.name} cannot act on {sharded!r}, which lies in shards on several processes (FSDP2, tensor "
            f"parallel): {act.not_sharded}; what works is one device, or 'ddp' and its variants"
        )
