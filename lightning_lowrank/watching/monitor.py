"""The one observing callback: runs probes at due steps, hands their reports to the sinks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.measuring.number_recorder import recorder_of
from lightning_lowrank.measuring.number_source import refuse_seed
from lightning_lowrank.measuring.probe import Probe, refuse_namesakes
from lightning_lowrank.measuring.recorder import Recorder
from lightning_lowrank.measuring.sampling import Sampling, plan
from lightning_lowrank.measuring.schedules import shared_budget
from lightning_lowrank.reports import loggers as sinks
from lightning_lowrank.reports.alerts.rulebook import Rulebook
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.reports.journal import Journal
from lightning_lowrank.watching import trainer as trainers
from lightning_lowrank.watching.account import Account


class Monitor(Account, L.Callback):
    """Measure what probes ask for, at the steps at which they are due, without a bit of difference to the training.

    Writes to every logger of the Trainer, at Lightning's own x-axis: `lowrank/<quantity>_{min,median,max}` over sites
    (also in `trainer.callback_metrics`), single sites as `<quantity>/<site>`, numbers of the whole model as
    `<quantity>`, and what it cost itself as `lowrank/<label>_...`: docs/reference.md has all tags.

    Args:
        probes: What to measure.
        per_site: Scalars of single sites: `True`, `False`, or "auto": if there are at most 100.
        histograms: Also the spectra, as histograms of log10 of the singular values (TensorBoard).
        seed: Of the sketches of large matrices.
        alerts: Rules that say when to warn, or "default".
        name: Prefix of all tags; two monitors in one Trainer need different ones where they measure the same.
        label: Word for this monitor in messages and cost tags.

    Raises:
        ValueError: There is no probe, two have one name, an option is another word, or an alert is on what is not
            measured.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        *,
        per_site: bool | Literal["auto"] = "auto",
        histograms: bool = False,
        seed: int = 0,
        alerts: Sequence[Alert] | Literal["default"] | None = None,
        name: str | None = None,
        label: str = "monitor",
    ) -> None:
        refuse_namesakes(probes)
        refuse_seed(seed)
        if per_site not in (True, False, "auto"):
            raise ValueError(f"per_site={per_site!r}: it is True, False or 'auto'")
        self.name, self.label, self.seed = name, f"{name}_{label}" if name else label, seed
        self.recorders = [recorder_of(probe, name, histograms=histograms) for probe in probes]
        self.budget = shared_budget([probe.schedule for probe in probes if probe.source.stage == "train"])
        watch = Rulebook(alerts, self._quantities(), prefix=name, label=self.label)
        self._journal = Journal(self.label, per_site=per_site, histograms=histograms, alerts=watch, budget=self.budget)
        for recorder in self.recorders:
            recorder.probe.source.timed = self._journal.clock.timed
        self._checked, self._enabled, self._resumed = -1, False, False
        self._sampling: Sampling | None = None
        self._validation: Sampling | None = None
        self._hooks: list[RemovableHandle] = []
        # What a sample still owed when the run that is resumed was stopped.
        self._waiting: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Names and probes, so that several monitors have their own place in a checkpoint."""
        return self._generate_state_key(label=self.label, quantities=self._quantities())

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, which load with `weights_only=True`."""
        counts: dict[str, Any] = {"checked": self._checked, "failures": self.failures, "skipped": self.skipped}
        counts["alerts"], budget = (
            self._journal.alerts.state_dict(),
            {} if self.budget is None else self.budget.state_dict(),
        )
        return counts | {
            "budget": budget,
            "waiting": self._owed(),
            "probes": {r.name: r.state_dict() for r in self.recorders},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run was stopped."""
        self._resumed = True
        self._checked, self._journal.failures, self._journal.skipped = (
            state_dict[key] for key in ("checked", "failures", "skipped")
        )
        self._waiting = state_dict["waiting"]
        self._journal.alerts.load_state_dict(state_dict.get("alerts", {}))
        if self.budget is not None:
            self.budget.load_state_dict(state_dict["budget"])
        for recorder in self.recorders:
            recorder.load_state_dict(state_dict["probes"][recorder.name])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the curves to disk before the checkpoint, so that a killed and resumed run has no gap in any."""
        if self._enabled:
            with self._guard():
                self._journal.count_errors(sinks.save(sinks.loggers_of(trainer)))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say so if the run that is resumed was watched in another way, or not at all."""
        if self.state_key not in checkpoint.get("callbacks", {}):
            self._journal.info_once(
                "the checkpoint has no state of this monitor with these quantities: what is held against it begins anew"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and a second monitor that would write the same tags."""
        trainers.refuse_hidden(trainer, pl_module)
        for other in (c for c in trainer.callbacks if isinstance(c, Monitor) and c is not self):  # type: ignore[attr-defined]
            self._refuse_double(other)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the sites; what matches nothing is refused here, before training."""
        self._enabled = not trainer.barebones
        if not self._resumed:
            self._checked, self._waiting = -1, {}
            self._journal.begin()
            for recorder in self.recorders:
                recorder.begin()
        if self._enabled:
            self._journal.count_errors(sinks.reopen(sinks.loggers_of(trainer)))
            trainers.refuse_hidden(trainer, pl_module)
            troubles, self._enabled = plan(self.recorders, pl_module, trainers.team_of(trainer))
            for trouble in troubles:
                self._journal.warn_once(trouble)
            self._journal.alerts.check(
                {quantity: r.sites_of(quantity) for r in self.recorders for quantity in r.quantities}
            )
            self._journal.announce(self.recorders)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._journal.start(on_device=pl_module.device.type == "cuda")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask the schedules, and let sources hook what they must."""
        if not self._enabled:
            return
        with self._guard():
            step = sinks.step_of(trainer)
            if step != self._checked:
                self._journal.step_begins(step, trainers.team_of(trainer))
            due = [r for r in self._watching("train") if step != self._checked and r.probe.schedule(step)]
            self._checked = step
            if due or self._waiting:
                self._sampling = self._sampling or self._sampled(trainer, trainer.optimizers, step)
                self._go_on(self._sampling, due)
            if self._sampling is not None:
                self._sampling.batch_begins(batch, batch_idx)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Let sources look at the live loss."""
        if self._sampling is not None:
            with self._guard():
                self._sampling.loss_live(loss, trainers.loss_scale(trainer, pl_module))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Read gradients and weights; uncompiled also where the user compiles the whole step."""
        if self._sampling is not None:
            with self._guard():
                self._sampling.gradients_final(optimizer, trainers.scale_of(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report if an optimizer stepped in this batch; else the sample waits for the next one."""
        self._unhook()
        if self._sampling is None:
            return
        sampling = self._sampling
        with self._guard():
            stepped = sampling.batch_over()
            self._journal.skipped += sampling.take_skipped()
            if stepped:
                recorders = list(sampling.recorders)
                self._report(trainer, recorders, sampling.report(), complete=sampling.complete)
        if sampling.complete:
            self._sampling = None
        self._alert(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take hooks off layers also where the module's `on_train_batch_start` ended the epoch before the batch."""
        if self._sampling is not None:
            with self._guard():
                self._sampling.batch_over()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the training clock; hook what is watched in validation."""
        self._journal.clock.pause()
        watching = self._watching("validation")
        if self._enabled and watching and not trainer.sanity_checking:
            with self._guard():
                self._validation = self._sampled(trainer, [], sinks.step_of(trainer))
                self._validation.join(watching)
                self._validation.batch_begins(None, 0)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report what was watched in validation."""
        if self._validation is not None:
            with self._guard():
                self._validation.batch_over()
                self._report(trainer, self._watching("validation"), self._validation.report(), complete=True)
            self._validation = None
            self._alert(trainer)
        if self._enabled:
            self._journal.clock.resume()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if nothing was ever seen."""
        if (
            self._enabled
            and self.latest is None
            and self._sampling is not None
            and not pl_module.automatic_optimization
        ):
            self._journal.warn_once(
                "no optimizer step was seen: in manual optimization, step the optimizers that `self.optimizers()` gives"
            )
        self._stop()
        self._journal.clock.pause()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, Ctrl-C included."""
        self._end()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Be ready for another run."""
        self._end()
        # Not after an exception: a checkpoint may be written after that.
        self._resumed = False

    def _end(self) -> None:
        """Leave no hook behind; a loop without training is not watched."""
        self._stop()
        self._unhook()
        self._journal.end()
        self._enabled = False

    def _report(
        self, trainer: L.Trainer, recorders: Sequence[Recorder], report: dict[str, Tensor], *, complete: bool
    ) -> None:
        """Move a report to the host and write it down."""
        host = sinks.to_host(report)
        if host.pop("finite", np.array(1.0)):
            with self._guard(loses=False):
                self._journal.write(trainer, recorders, host, complete=complete)
                self._journal.lay_out(trainer, {r.name: r.quantities for r in self.recorders})
        elif self._sampling is not None:  # a fused optimizer skipped its step inside: take the next
            self._journal.skipped += 1
            self._sampling.join(recorders)

    def _alert(self, trainer: L.Trainer) -> None:
        """Do what alerts ask for; only what the user wants to end the run leaves here."""
        with self._guard(loses=False):
            self._journal.act(trainer)
        self._journal.alerts.raise_if_asked()

    def _owed(self) -> dict[str, Any]:
        """What a sample in the making waits for, as plain numbers: it is taken up by a run that is resumed."""
        return self._waiting if self._sampling is None else self._sampling.state_dict(self._journal.given)

    def _go_on(self, sampling: Sampling, due: Sequence[Recorder]) -> None:
        """Take up what a sample owed when the run was stopped, and what has become due."""
        waiting, self._waiting = self._waiting, {}
        if waiting:
            sampling.resume(waiting, self.recorders)
            self._journal.given |= {name: set(sites) for name, sites in waiting["given"].items()}
        if due:
            sampling.join(due)

    def _stop(self) -> None:
        """Give up the sample in the making, but let a checkpoint know of it that is still to be written."""
        self._waiting = self._owed()
        self._abandon(for_good=True)

    def _sampled(self, trainer: L.Trainer, optimizers: Sequence[Optimizer], step: int) -> Sampling:
        """A new sample, with the same draws at the same step, in a resumed run too."""
        module, team = trainer.lightning_module, trainers.team_of(trainer)
        generator = torch.Generator(module.device).manual_seed(self.seed + step)
        return Sampling(
            module, optimizers, generator, team, self._guard, self._hooks, may_skip=trainers.may_skip(trainer)
        )

    @contextmanager
    def _guard(self, *, loses: bool = True) -> Iterator[None]:
        """Ours is timed; what goes wrong in it never ends the run, only the sample: and not even that where one process
        works alone.
        """
        with self._journal.clock.timed():
            try:
                yield
            except Exception as error:
                self._journal.warn_once(
                    f"{type(error).__name__}: {error}{'; this sample is lost' if loses else ''}", everywhere=True
                )
                if loses:
                    self._abandon()

    def _abandon(self, *, for_good: bool = False) -> None:
        """Give up what was found so far. Other processes may still wait for this one in the next report."""
        self._journal.forget()
        samplings = [s for s in (self._sampling, self._validation) if s is not None]
        for sampling in samplings:
            sampling.abandon()
        if for_good or not any(sampling.awaited for sampling in samplings):
            self._sampling = self._validation = None
        for recorder in self.recorders:
            recorder.abandon()

    def _unhook(self) -> None:
        """Take our hooks off the optimizers; not sooner than they are through."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
