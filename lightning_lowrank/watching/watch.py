"""One training under watch: probes at due steps, their numbers to loggers and alerts, nothing changed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_lowrank.measuring.number_recorder import recorder_of
from lightning_lowrank.measuring.number_source import refuse_seed
from lightning_lowrank.measuring.probe import Probe, refuse_namesakes
from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.sampling import Sampling, plan
from lightning_lowrank.models.taps import unheard
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports import loggers
from lightning_lowrank.reports.alerts.rulebook import Rulebook, Rules, Usual
from lightning_lowrank.reports.alerts.rules import AlertEvent
from lightning_lowrank.reports.dashboard import Sample
from lightning_lowrank.reports.journal import Journal
from lightning_lowrank.reports.report import Style
from lightning_lowrank.watching.asking import Asking
from lightning_lowrank.watching.late import Late, put_off


class Watch:
    """The moments of a training, whoever runs its loop; what a callback or a loop of the user's calls.

    Each moment takes the training. Nothing here raises into it, save an alert whose rule asks for that, and what
    `begins` refuses.

    Args:
        probes: What to measure.
        style: What of it loggers get.
        seed: Of the sketches of large matrices.
        alerts: Rules that say when to warn, or "default".
        usual: What "default" stands for.
        spread: Batches over which decompositions are spread.

    Raises:
        ValueError: There is no probe, two have one name, or an alert is on what is not measured.
    """

    def __init__(
        self, probes: Sequence[Probe], style: Style, *, seed: int, alerts: Rules, usual: Usual, spread: int = 0
    ) -> None:
        refuse_namesakes(probes)
        refuse_seed(seed)
        self.label, self.seed, self._spread = style.label, seed, spread
        prefix = style.prefix.removesuffix("_") or None
        self.recorders = [recorder_of(probe, prefix, histograms=style.histograms) for probe in probes]
        self._asking = Asking(self._of_stage("train"))
        self.budget = self._asking.budget
        rulebook = Rulebook(alerts, self.quantities, usual=usual, prefix=prefix, label=self.label)
        self.journal = Journal(style, alerts=rulebook, budget=self.budget)
        for recorder in self.recorders:
            recorder.probe.source.timed = self.journal.clock.timed
        self._enabled = self._resumed = False
        self.sampling: Sampling | None = None  # in the making
        self._validation: Sampling | None = None
        self._hooks: list[RemovableHandle] = []
        self._late: Late | None = None
        self._untold: Training | None = None  # alerts were shown a report of it, and are not answered
        # State of an unfinished sample of the run that is resumed.
        self._waiting: dict[str, Any] = {}

    @property
    def rests(self) -> bool:
        """Whether there is nothing to do in this batch, nor after it."""
        return not (self._hooks or self.sampling or self._late or self._untold)

    @property
    def first(self) -> Sample | None:
        """The first number of everything measured, None before."""
        self._catch_up()
        return self.journal.first

    @property
    def latest(self) -> Sample | None:
        """The latest number of everything measured, None before."""
        self._catch_up()
        return self.journal.latest

    @property
    def failures(self) -> int:
        """Numbers that are missing so far, each with a warning of its kind."""
        return self.journal.failures

    @property
    def skipped(self) -> int:
        """Steps that a GradScaler skipped when a sample was due."""
        return self.journal.skipped

    @property
    def events(self) -> list[AlertEvent]:
        """Alerts so far."""
        self._catch_up()
        return list(self.journal.alerts.events)

    @property
    def metrics(self) -> dict[str, Metric]:
        """The torchmetrics that hold the numbers of the sample being taken, by probe."""
        return {recorder.name: recorder.means for recorder in self.recorders}

    @property
    def overhead(self) -> float:
        """How much longer training takes by this monitor, in percent: host time, validation not counted."""
        return self.journal.clock.percent

    @property
    def quantities(self) -> list[str]:
        """Names of everything measured."""
        return [quantity for recorder in self.recorders for quantity in recorder.quantities]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, which load with `weights_only=True`."""
        self._catch_up()
        return {
            "quantities": self.quantities,
            "checked": self._asking.checked,
            "journal": self.journal.state_dict(),
            "waiting": self._unfinished(),
            "probes": {recorder.name: recorder.state_dict() for recorder in self.recorders},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a stopped run, or begin again if other quantities were measured."""
        if state["quantities"] != self.quantities:
            self.journal.info_once("the checkpoint has other quantities, so comparisons over samples start again")
            return
        self._resumed = True
        self._asking.checked, self._waiting = state["checked"], state["waiting"]
        self.journal.load_state_dict(state["journal"])
        for recorder in self.recorders:
            recorder.load_state_dict(state["probes"][recorder.name])

    def begins(self, training: Training) -> None:
        """Choose the sites of a run.

        Raises:
            ValueError: What was asked for is not there; the message lists what is.
        """
        self._enabled = True
        if not self._resumed:
            self._asking.checked, self._waiting = -1, {}
            self.journal.begin(training)
            for recorder in self.recorders:
                recorder.begin()
        self.journal.count_errors(loggers.reopen(training.loggers))
        try:
            troubles, self._enabled = plan(self.recorders, training)
        except ValueError as error:
            self._enabled = self.journal.refuse(error)
            return
        for trouble in troubles:
            self.journal.warn_once(trouble)
        self.journal.prepare(self.recorders, training)

    def starts(self, training: Training) -> None:
        """Say what will be measured, and start the clock."""
        self.journal.start(training, self.recorders if self._enabled else ())

    def batch_begins(self, training: Training, batch: Any, index: int) -> None:
        """Ask the schedules, and let sources place what hooks they need."""
        idle = self.sampling is None and not self._waiting
        if not self._enabled or (idle and self._asking.rests(training.step)):
            return
        due = self._due(training)
        if idle and not due:
            return
        with self._guard():
            if due or self._waiting:
                self._catch_up()
                self.sampling = self.sampling or self._sampled(training)
                put_off(due, self._spread, training, self.budget)
                self._continue(self.sampling, due)
            if self.sampling is not None:
                self.sampling.batch_begins(batch, index)
                self.journal.clock.samples()

    def _due(self, training: Training) -> list[Recorder]:
        """What has become due with this batch. Without the guard, which would take longer than to ask."""
        try:
            return self._asking.due(training, self.journal)
        except Exception as error:  # a schedule of the user's
            self._lose(error)
            return []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def loss_live(self, training: Training, loss: Tensor) -> None:
        """Let sources look at the live loss."""
        if self.sampling is not None:
            with self._guard():
                self.sampling.loss_live(loss, training.loss_scale())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward_done(self) -> None:
        """Let sources look at the gradients of one micro-batch."""
        if self.sampling is not None:
            with self._guard():
                self.sampling.backward_done()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gradients_final(self, training: Training, optimizer: Optimizer) -> None:
        """Read gradients and weights; uncompiled also where the user compiles the whole step."""
        if self.sampling is not None:
            with self._guard():
                self.sampling.gradients_final(optimizer, training.gradient_scale(optimizer))

    def batch_over(self, training: Training) -> None:
        """Report if an optimizer stepped in this batch; else the sample waits for the next one."""
        if self.rests:
            return
        self._unhook()
        if self._late is not None:
            with self._guard():
                if self._late.work():
                    self._catch_up()
        sampling = self.sampling
        if sampling is not None:
            with self._guard():
                stepped = sampling.batch_over()
                self.journal.skipped += sampling.take_skipped()
                if stepped:
                    sampling.read()
                    self._late = Late(sampling, list(sampling.recorders), training, training.step, self._spread)
                    if not sampling.is_late:
                        self._catch_up()
            if sampling.complete:
                self.sampling = None
        self._alert()

    def batch_failed(self) -> None:
        """Give up the sample of a batch that an exception has left, and take it of the next batch."""
        self._catch_up()
        self._unhook()
        with self._guard():
            self._waiting = self._unfinished()
            self._abandon()

    def epoch_over(self) -> None:
        """Take hooks off layers also where the user's own hook ended the epoch before the batch."""
        self._catch_up()
        self.journal.clock.interrupt()
        if self.sampling is not None:
            with self._guard():
                self.sampling.batch_over()

    def validation_begins(self, training: Training) -> None:
        """Stop the training clock; hook what is watched in validation."""
        self._catch_up()
        self.journal.clock.pause()
        watched = self._of_stage("validation")
        if self._enabled and watched:
            with self._guard():
                self._validation = self._sampled(training, no_optimizers=True)
                self._validation.join(watched)
                self._validation.batch_begins(None, 0)

    def validation_over(self, training: Training) -> None:
        """Report what was watched in validation."""
        if self._validation is not None:
            with self._guard():
                self._validation.batch_over()
                self._validation.read()
                self._late = Late(self._validation, self._of_stage("validation"), training, training.step)
                self._catch_up()
            self._validation = None
            self._alert()
        if self._enabled:
            self.journal.clock.resume()

    def save(self, training: Training) -> None:
        """Write the curves to disk before a checkpoint, so that a killed and resumed run has no gap in any."""
        self._catch_up()
        if self._enabled:
            with self._guard():
                self.journal.count_errors(loggers.save(training.loggers))

    def stops(self, *, advice: str = "") -> None:
        """The training is over.

        Args:
            advice: What to do if no optimizer step was ever seen.
        """
        self._catch_up()
        self._answer()
        if self._enabled and self.latest is None and self.sampling is not None and advice:
            self.journal.warn_once(f"no optimizer step was seen: {advice}")
        self._stop()
        self.journal.clock.pause()

    def ends(self) -> None:
        """Leave no hook behind, whatever happened."""
        self._catch_up()
        self._stop()
        self._unhook()
        self.journal.end()
        self._enabled = False

    def forget_resumed(self) -> None:
        """Another run after this one is no continuation."""
        self._resumed = False

    def _of_stage(self, stage: str) -> list[Recorder]:
        return [r for r in self.recorders if r.probe.source.stage == stage]

    def _catch_up(self) -> None:
        """Report the sample that is read, where there is one: what alerts make of it is done after a batch."""
        read, self._late = self._late, None
        if read is None:
            return
        self._untold = read.training
        with self._guard():
            host = loggers.to_host(read.sampling.report())
            if host.pop("finite", np.array(1.0)):
                with self._guard(loses=False):
                    self.journal.write(read.training, read.step, read.recorders, host, complete=read.sampling.complete)
            elif self.sampling is not None:  # a fused optimizer skipped its step inside: take the next
                self.journal.skipped += 1
                self.sampling.join(read.recorders)

    def _alert(self) -> None:
        """Do what alerts ask for after a report; only what the user wants to end the run leaves here."""
        self._answer()
        self.journal.alerts.raise_if_asked()

    def _answer(self) -> None:
        training, self._untold = self._untold, None
        if training is not None:
            with self._guard(loses=False):
                self.journal.act(training)

    def _unfinished(self) -> dict[str, Any]:
        """State of the sample in the making: a run that is resumed goes on with it."""
        return self._waiting if self.sampling is None else self.sampling.state_dict(self.journal.given)

    def _continue(self, sampling: Sampling, due: Sequence[Recorder]) -> None:
        """Resume the sample that was unfinished when the run was stopped, and add what has become due."""
        waiting, self._waiting = self._waiting, {}
        if waiting:
            sampling.resume(waiting, self.recorders)
            self.journal.given |= {name: set(sites) for name, sites in waiting["given"].items()}
        if due:
            sampling.join(due)

    def _stop(self) -> None:
        """Give up the sample in the making, but let a checkpoint know of it that is still to be written."""
        self._waiting = self._unfinished()
        self._abandon(for_good=True)

    def _sampled(self, training: Training, *, no_optimizers: bool = False) -> Sampling:
        """A new sample, with the same draws at the same step, in a resumed run too."""
        generator = torch.Generator(training.device).manual_seed(self.seed + training.step)
        optimizers = () if no_optimizers else training.optimizers
        return Sampling(training, optimizers, generator, self._guard, self._hooks)

    @contextmanager
    def _guard(self, *, loses: bool = True) -> Iterator[None]:
        """Context of all our work: timed, unheard by taps, and without an exception that could end the run.

        Args:
            loses: What goes wrong costs the sample.
        """
        # Anomaly mode would name our products as the user's error.
        with self.journal.clock.timed(), unheard(), torch.autograd.set_detect_anomaly(False):
            try:
                yield
            except Exception as error:
                self._lose(error, loses=loses)

    def _lose(self, error: Exception, *, loses: bool = True) -> None:
        """Say what went wrong, and give up the sample where that is what it costs."""
        lost = "; this sample is lost" if loses else ""
        self.journal.warn_once(f"{type(error).__name__}: {error}{lost}", everywhere=True)
        if loses:
            self._abandon()

    def _abandon(self, *, for_good: bool = False) -> None:
        """Give up what was found so far. Other processes may still wait for this one in the next report."""
        self.journal.forget()
        self._late = None
        samplings = [s for s in (self.sampling, self._validation) if s is not None]
        for sampling in samplings:
            sampling.abandon()
        if for_good or not any(sampling.awaited for sampling in samplings):
            self.sampling = self._validation = None
        for recorder in self.recorders:
            recorder.abandon()

    def _unhook(self) -> None:
        """Take our hooks off the optimizers; not sooner than they are through."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
