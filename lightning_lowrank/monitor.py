"""The one observing callback: runs probes at due steps, hands their reports to the sinks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_lowrank import dashboard, sinks
from lightning_lowrank.clock import Clock
from lightning_lowrank.dashboard import Sample
from lightning_lowrank.probe import Probe, Recorder
from lightning_lowrank.sampling import BATCH, Sampling

# Most scalars of single sites that `per_site="auto"` writes: what a dashboard still shows at once.
FEW = 100


class Monitor(L.Callback):
    """Measure what probes ask for, at the steps at which they are due, without a bit of difference to the training.

    Writes to every logger of the Trainer, at Lightning's own x-axis: `lowrank/<quantity>_{min,median,max}` over sites, single sites as
    `<quantity>/<site>`, and its own cost as `lowrank/<label>_time_ms` (of the sample), `lowrank/<label>_overhead_percent` (of training
    time so far), `lowrank/<label>_failures` (numbers that could not be had, so far), `lowrank/<label>_skipped_steps` (by a GradScaler, so
    far) and `lowrank/<label>_solver_calls` (of an eigensolver, in the sample; each waits for the device on CUDA). The summaries are also in
    `trainer.callback_metrics`.

    Args:
        probes: What to measure.
        per_site: Scalars of single sites: `True`, `False`, or "auto": if there are at most 100.
        histograms: Also the spectra, as histograms of log10 of the singular values (TensorBoard).
        seed: Of the sketches of large matrices.
        name: Prefix of all tags; two monitors in one Trainer need different ones where they measure the same.
        label: Word for this monitor in messages and cost tags.

    Raises:
        ValueError: There is no probe, two have one name, or an option is another word.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        *,
        per_site: bool | Literal["auto"] = "auto",
        histograms: bool = False,
        seed: int = 0,
        name: str | None = None,
        label: str = "monitor",
    ) -> None:
        names = [probe.name for probe in probes]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a monitor takes at least one probe, each with a name of its own; these are {names}")
        if per_site not in (True, False, "auto"):
            raise ValueError(f"per_site={per_site!r}: it is True, False or 'auto'")
        self.name, self.label, self.seed = name, f"{name}_{label}" if name else label, seed
        self.per_site, self.histograms = per_site, histograms
        self.recorders = [Recorder(probe, prefix=name, histograms=histograms) for probe in probes]
        self.first: Sample | None = None
        self.latest: Sample | None = None
        self.failures = 0
        self.skipped = 0
        self._clock = Clock()
        self._warned: set[str] = set()
        self._checked = -1
        self._enabled = self._laid_out = False
        self._sampling: Sampling | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def metrics(self) -> dict[str, Metric]:
        """The torchmetrics that hold the numbers of the sample being taken, by probe."""
        return {recorder.name: recorder.means for recorder in self.recorders}

    @property
    def overhead(self) -> float:
        """What this monitor cost so far, in percent of the training time: host time, validation not counted."""
        return self._clock.percent

    @property
    def state_key(self) -> str:
        """Names and probes, so that several monitors have their own place in a checkpoint."""
        return self._generate_state_key(label=self.label, quantities=self._quantities())

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, which load with `weights_only=True`."""
        counts = {"checked": self._checked, "failures": self.failures, "skipped": self.skipped}
        return counts | {"probes": {r.name: r.state_dict() for r in self.recorders}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run was stopped."""
        self._checked, self.failures, self.skipped = (state_dict[key] for key in ("checked", "failures", "skipped"))
        for recorder in self.recorders:
            recorder.load_state_dict(state_dict["probes"][recorder.name])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a second monitor that would write the same tags."""
        for other in (c for c in trainer.callbacks if isinstance(c, Monitor) and c is not self):  # type: ignore[attr-defined]
            both = {self.label, *self._quantities()} & {other.label, *other._quantities()}
            if both:
                names = f"monitors {self.label!r} and {other.label!r}"
                raise ValueError(f"{names} would both write {sorted(both)}: give one of them name='...'")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the sites; what matches nothing is refused here, before training."""
        self._enabled = not trainer.barebones
        if self._enabled:
            for recorder in self.recorders:
                recorder.plan(pl_module)
            rank_zero_info(self._plan())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._clock.start()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the schedules, and let sources hook what they must."""
        if not self._enabled:
            return
        with self._guard():
            step = sinks.step_of(trainer)
            due = [r for r in self._watching("train") if step != self._checked and r.probe.schedule(step)]
            self._checked = step
            if due:
                self._sampling = self._sampling or Sampling(
                    pl_module, trainer.optimizers, self._generator(pl_module, step), self._guard, self._hooks
                )
                self._sampling.join(due)
            if self._sampling is not None:
                self._sampling.batch_begins()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Read gradients and weights."""
        if self._sampling is not None:
            with self._guard():
                self._sampling.gradients_final(optimizer, _scale(trainer, optimizer))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report if an optimizer stepped in this batch; else the sample waits for the next one."""
        self._unhook()
        if self._sampling is None:
            return
        with self._guard():
            sampling = self._sampling
            if sampling.batch_over():
                recorders = list(sampling.recorders)
                self._report(trainer, recorders, sampling.report(), complete=sampling.complete)
            if sampling.complete:
                self.skipped += sampling.num_skipped
                self._sampling = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the training clock; hook what is watched in validation."""
        self._clock.pause()
        if self._enabled and not trainer.sanity_checking:
            with self._guard():
                for recorder in self._watching("validation"):
                    recorder.plan(pl_module)
                    recorder.probe.source.batch_begins(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report what was watched in validation."""
        watching = self._watching("validation")
        if self._enabled and watching and not trainer.sanity_checking:
            with self._guard():
                generator = self._generator(pl_module, sinks.step_of(trainer))
                for recorder in watching:
                    recorder.probe.source.batch_over()
                    recorder.record(BATCH, recorder.probe.source.sample_over(), generator)
                    recorder.commit(BATCH)
                report = {key: row for recorder in watching for key, row in recorder.report().items()}
                self._report(trainer, watching, report, complete=True)
        self._clock.resume()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if nothing was ever seen."""
        if self._enabled and self.latest is None and self._sampling is not None:
            self._warn("no optimizer step was seen: in manual optimization, step the optimizers that `self.optimizers()` gives")
        self._abandon()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, Ctrl-C included."""
        self._abandon()
        self._unhook()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._abandon()
        self._unhook()

    def _report(self, trainer: L.Trainer, recorders: Sequence[Recorder], report: dict[str, Tensor], *, complete: bool) -> None:
        """Move a report to the host, keep it, and write it to all loggers."""
        host = sinks.to_host(report)
        if not host.pop("finite", np.array(1.0)):
            self._repeat(recorders)
            return
        self._count_losses(recorders, host, complete)
        values = {q: self._by_site(r, host[q], complete) for r in recorders for q in host if q in r.measured}
        self.latest = Sample(sinks.step_of(trainer), values)
        self.first = self.first or self.latest
        self._write(trainer, recorders, host)

    def _repeat(self, recorders: Sequence[Recorder]) -> None:
        """A fused optimizer skipped its step inside: this sample never was, take the next."""
        self.skipped += 1
        if self._sampling is not None:
            self._sampling.join(recorders)

    def _by_site(self, recorder: Recorder, row: NDArray[np.float64], complete: bool) -> dict[str, float]:
        """Numbers by site; of a sample that still waits for an optimizer only those that are there."""
        numbers = dict(zip(recorder.sites, row.tolist(), strict=True))
        return numbers if complete else {site: value for site, value in numbers.items() if not np.isnan(value)}

    def _count_losses(self, recorders: Sequence[Recorder], host: Mapping[str, NDArray[np.float64]], complete: bool) -> None:
        """Count sites that gave no number: not finite, not decomposed, or not there."""
        for recorder in recorders:
            flags = zip(recorder.sites, host[f"{recorder.name}_lost"], strict=True)
            lost = [site for site, flag in flags if flag > 0 or (complete and np.isnan(flag))]
            error = recorder.take_error()
            self.failures += len(lost) or int(error is not None)
            if lost or error:
                where = f"{len(lost)} of {len(recorder.sites)} sites, the first is {lost[0]!r}" if lost else "some sites"
                self._warn(f"{recorder.name}: no number for {where}{f' ({error})' if error else ''}")
            elif not recorder.sites and (nothing := f"no {recorder.name}") not in self._warned:
                self._warned.add(nothing)
                rank_zero_info(f"lightning_lowrank {self.label}: there is no {recorder.name} to read")

    def _write(self, trainer: L.Trainer, recorders: Sequence[Recorder], host: Mapping[str, NDArray[np.float64]]) -> None:
        """Summaries, sites and our own cost to all loggers, on Lightning's x-axis."""
        assert self.latest is not None
        summaries = {
            f"lowrank/{quantity}_{end}": value
            for quantity, values in self.latest.values.items()
            for end, value in sinks.summaries(np.array(list(values.values()))).items()
        }
        sites = {f"{quantity}/{site}": value for quantity, values in self.latest.values.items() for site, value in values.items()}
        if self.per_site is False or (self.per_site == "auto" and len(sites) > FEW):
            sites = {}
        facts = {f"lowrank/{r.name}_{key}": value for r in recorders for key, value in r.probe.source.facts().items()}
        sinks.mirror(trainer, summaries)
        failed = sinks.write(trainer.loggers, summaries | sites | facts | self._costs(), self.latest.step)
        for error in failed:
            self.failures += 1
            self._warn(f"a logger raised {type(error).__name__}: {error}")
        if self.histograms:
            sinks.write_histograms(trainer.loggers, {tag: row for tag, row in host.items() if "_spectrum/" in tag}, self.latest.step)
        self._lay_out(trainer)

    def _costs(self) -> dict[str, float]:
        """Our own cost and failure counts."""
        numbers = {
            "time_ms": 1000 * self._clock.take_sample(),
            "overhead_percent": self._clock.percent,
            "failures": float(self.failures),
            "skipped_steps": float(self.skipped),
            "solver_calls": float(sum(r.take_solves() for r in self.recorders)),
        }
        return {f"lowrank/{self.label}_{key}": value for key, value in numbers.items()}

    def _lay_out(self, trainer: L.Trainer) -> None:
        """TensorBoard's custom-scalars page, once."""
        if not self._laid_out:
            self._laid_out = True
            layout = dashboard.layout({recorder.name: recorder.quantities for recorder in self.recorders})
            for writer in sinks.experiments(trainer.loggers, "add_custom_scalars"):
                dashboard.write_layout(writer, layout)

    def _watching(self, stage: str) -> list[Recorder]:
        return [r for r in self.recorders if r.probe.source.stage == stage]

    def _quantities(self) -> list[str]:
        return [quantity for recorder in self.recorders for quantity in recorder.quantities]

    def _plan(self) -> str:
        """What will be measured, said once at the start."""
        counts = ", ".join(f"{r.name} at {len(r.sites)} sites ({r.probe.schedule})" for r in self.recorders)
        kept = [f"{r.name} keeps {r.probe.source.facts()['bytes']:,.0f} bytes" for r in self.recorders if "bytes" in r.probe.source.facts()]
        return f"lightning_lowrank {self.label}: {'; '.join([counts, *kept])}"

    def _generator(self, module: L.LightningModule, step: int) -> torch.Generator:
        """The same draws at the same step, in a resumed run too."""
        return torch.Generator(module.device).manual_seed(self.seed + step)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Ours is timed, and what goes wrong in it ends the sample, never the run."""
        with self._clock.ours():
            try:
                yield
            except Exception as error:
                self.failures += 1
                self._warn(f"{type(error).__name__}: {error}; this sample is lost")
                self._abandon()

    def _abandon(self) -> None:
        if self._sampling is not None:
            self._sampling.abandon()
            self._sampling = None
        for recorder in self.recorders:
            recorder.abandon()

    def _unhook(self) -> None:
        """Take our hooks off the optimizers; not sooner than they are through."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _warn(self, message: str) -> None:
        """Each kind of trouble once; all of it is counted in the curves."""
        kind = message.partition(":")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(f"lightning_lowrank {self.label}: {message}. Training goes on; counted in lowrank/{self.label}_failures.")


def _scale(trainer: L.Trainer, optimizer: Optimizer) -> Tensor | None:
    """What gradients are still multiplied by: fused optimizers unscale inside their step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    # get_scale() would wait for the device.
    return scaler._get_scale_async() if scaler is not None and scaler.is_enabled() and fused else None
