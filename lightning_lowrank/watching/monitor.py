"""The observing Lightning callback: hands the moments of a Trainer to a watch."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_lowrank.measuring.number_source import Detail, NumberSource
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.schedules import Budget, Every
from lightning_lowrank.reports.alerts.ready_made import default_alerts
from lightning_lowrank.reports.alerts.rules import Alert, AlertEvent
from lightning_lowrank.reports.dashboard import Sample
from lightning_lowrank.reports.report import Style
from lightning_lowrank.watching.arguments import Arguments
from lightning_lowrank.watching.doubles import refuse_double
from lightning_lowrank.watching.trainer import TrainerTraining, beside, refuse_hidden
from lightning_lowrank.watching.watch import Watch

# Hooks that have nothing to do between samples.
IDLE = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Monitor(Arguments, L.Callback):
    """Measure what probes request, at the steps that their schedules choose, without changing the training by a single
    bit.

    The monitor writes to every logger of the Trainer, with Lightning's own x-axis:
    `<label>/<quantity>_{min,median,max}` over sites and `<label>/<quantity>` for the whole model (both also in
    `trainer.callback_metrics`). Single sites are `<quantity>/<site>`, and its own cost is `lowrank/<label>_...`.
    docs/reference.md lists all tags.

    Args:
        probes: What to measure.
        detail: What loggers get: "core", "standard" or "all"; TensorBoard's tab and reports have everything.
        per_site: Curves of single sites: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        histograms: Whether to write spectra, too, as histograms of log10 of the singular values (TensorBoard).
        seed: Seed for sketches of large matrices.
        alerts: Alert rules, or "default".
        name: Prefix of all tags; two monitors of the same kind in one Trainer need different ones.
        spread: Batches over which the decompositions of a sample are spread, so that no step waits for all of them.

    Attributes:
        place: Its place in a checkpoint: the class, and the label if it is not the default one.

    Raises:
        ValueError: There is no probe, two probes have the same name, an option is unknown, or an alert's quantity is
            not measured. When training starts: something to measure does not exist, or another monitor writes the same
            tags.
    """

    # Word for this kind of monitor, in messages and as the group of its tags; one that measures in another way may say
    # so before `super().__init__`.
    word: str = "monitor"

    def __init__(
        self,
        probes: Sequence[Probe],
        *,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        histograms: bool = False,
        seed: int = 0,
        alerts: Sequence[Alert] | Literal["default"] | None = None,
        name: str | None = None,
        spread: int = 0,
    ) -> None:
        if name == "":
            raise ValueError("name='' must be a word, which begins all tags, or None")
        if spread < 0:
            raise ValueError(
                f"spread={spread} must be the number of batches over which decompositions are spread; 0 for none"
            )
        self.name = name
        prefix = f"{name}_" if name else ""
        style = Style(prefix + self.word, prefix, detail, per_site, histograms)
        self.watch = self._watch(probes, style, seed=seed, alerts=alerts, usual=self.usual_alerts, spread=spread)
        kind = type(self)
        self.place = kind.__qualname__ + ("" if self.watch.label == kind.word else f"[{self.watch.label}]")
        self._is_set_up = self._rests = False

    def _watch(self, probes: Sequence[Probe], style: Style, **options: Any) -> Watch:
        """What leads it through a training."""
        return Watch(probes, style, **options)

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """The rules of `alerts="default"`, by measured quantity."""
        return default_alerts(quantities)

    @property
    def state_key(self) -> str:
        """Its place in a Trainer's checkpoint. Lightning reads it at every call of the callback.

        It is another one until `setup`, which refuses a second monitor of the same place with a helpful message.
        Lightning would refuse it earlier, with a message that does not say what to do.
        """
        return self.place if self._is_set_up else f"{self.place} {id(self)}"

    @property
    def label(self) -> str:
        """Its word in messages, and the group of its tags: that of its kind, after the name if there is one."""
        return self.watch.label

    @property
    def recorders(self) -> Sequence[Recorder]:
        """Its probes at work."""
        return self.watch.recorders

    @property
    def budget(self) -> Budget | None:
        """The budget that chooses the cadence; None for a fixed cadence."""
        return self.watch.budget

    @property
    def first(self) -> Sample | None:
        """The first number of everything measured; None before the first sample."""
        return self.watch.first

    @property
    def latest(self) -> Sample | None:
        """The latest number of everything measured; None before the first sample."""
        return self.watch.latest

    @property
    def failures(self) -> int:
        """How many measurements have failed so far; the first failure of each kind gives a warning."""
        return self.watch.failures

    @property
    def skipped(self) -> int:
        """Number of steps that a GradScaler skipped when a sample was due."""
        return self.watch.skipped

    @property
    def no_number_since(self) -> int | None:
        """Step from which nothing can be read, since the weights are not numbers; None while they are."""
        return self.watch.journal.no_number_since

    @property
    def events(self) -> list[AlertEvent]:
        """Alerts so far."""
        return self.watch.events

    @property
    def metrics(self) -> dict[str, Metric]:
        """The torchmetrics that hold the numbers of the sample being taken, by probe."""
        return self.watch.metrics

    @property
    def overhead(self) -> float:
        """How much longer training takes because of this monitor, in percent of host time, without validation."""
        return self.watch.overhead

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, which load with `weights_only=True`."""
        return self.watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a stopped run."""
        self.watch.load_state_dict(state_dict)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and a second monitor that would write the same tags."""
        refuse_hidden(trainer.strategy, pl_module)
        others = [c for c in beside(trainer) if isinstance(c, Monitor) and c is not self]
        for other in others:
            self.refuse_double(other)
        self._is_set_up = True

    def refuse_double(self, other: "Monitor") -> None:
        """Refuse a second monitor that would write the same tags.

        Raises:
            ValueError: There is one; the message says what to do.
        """
        if other.place == self.place:
            kind = type(self).__name__
            raise ValueError(
                f"two {kind} in one training, {self!r} and {other!r}; distinguish them with {kind}(..., name='...')"
            )
        refuse_double(self.watch, other.watch)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the sites. Patterns that match nothing are refused here, before training."""
        if not trainer.barebones:
            refuse_hidden(trainer.strategy, pl_module)
            self.watch.begins(TrainerTraining(trainer, pl_module))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.watch.starts(TrainerTraining(trainer, pl_module))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask whether a sample is due."""
        self.watch.batch_begins(TrainerTraining(trainer, pl_module), batch, batch_idx)
        if self._rests is not self.watch.rests:
            # A callback of the user's that passes its hooks on would call what is none.
            self._rest(self.watch.rests and self in beside(trainer))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Show the live loss."""
        if not self.watch.rests:
            self.watch.loss_live(TrainerTraining(trainer, pl_module), loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the gradients of one micro-batch."""
        if not self.watch.rests:
            self.watch.backward_done()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Show gradients: synchronised, unscaled and accumulated, but not yet clipped."""
        if not self.watch.rests:
            self.watch.gradients_final(TrainerTraining(trainer, pl_module), optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report."""
        self.watch.batch_over(TrainerTraining(trainer, pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove hooks from layers, even if the module's `on_train_batch_start` ended the epoch before the batch."""
        self.watch.epoch_over()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch a validation loop."""
        if trainer.sanity_checking:
            self.watch.journal.clock.pause()
        else:
            self.watch.validation_begins(TrainerTraining(trainer, pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report on the validation loop."""
        self.watch.validation_over(TrainerTraining(trainer, pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report if nothing was ever seen; the last alert may end the run."""
        advice = "in manual optimization, step the optimizers that `self.optimizers()` returns"
        self.watch.stops(advice="" if pl_module.automatic_optimization else advice)
        self.watch.journal.alerts.raise_if_asked()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the curves to disk before the checkpoint."""
        self.watch.save(TrainerTraining(trainer, pl_module))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Report if the resumed run was watched in another way, or not at all."""
        if self.state_key not in checkpoint.get("callbacks", {}):
            self.watch.journal.info_once(
                f"the checkpoint has no state of {self.place}, so comparisons with earlier samples start again"
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove all hooks, also after Ctrl-C."""
        self.watch.ends()
        self._rest(False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Be ready for another run."""
        self.watch.ends()
        self._rest(False)
        TrainerTraining(trainer, pl_module).forget(f"{self.label}/")
        # Not after an exception: a checkpoint may be written after that.
        self.watch.forget_resumed()

    def _rest(self, rests: bool) -> None:
        """Between samples Lightning passes over hooks that would do nothing, as they are no functions then: its calls
        of them would take longer than all that we do at such a step. Hooks of a subclass stay.
        """
        self._rests = rests
        for name in IDLE:
            if rests and getattr(type(self), name) is getattr(Monitor, name):
                vars(self).setdefault(name, None)
            elif vars(self).get(name, self) is None:
                del vars(self)[name]


def probe_of(source: NumberSource, schedule: Every | Budget) -> list[Probe]:
    """The one probe of a monitor of finished numbers: all that its source gives."""
    return [Probe(source.name, source, [quantity.name for quantity in source.quantities], schedule)]


def cadence(every_n_steps: int | None, max_overhead: float | None, default: int) -> Every | Budget:
    """The schedule that a user asked for.

    Raises:
        ValueError: Both are given, or one is out of range.
    """
    if every_n_steps is not None and every_n_steps < 1:
        raise ValueError(f"every_n_steps={every_n_steps} must be at least 1 optimizer step")
    if max_overhead is None:
        return Every(default if every_n_steps is None else every_n_steps)
    if every_n_steps is not None:
        raise ValueError(
            f"every_n_steps={every_n_steps} and max_overhead={max_overhead}: give only one of them, since a budget "
            "chooses the cadence"
        )
    return Budget(max_overhead)
