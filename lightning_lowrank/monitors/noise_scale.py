"""`NoiseScaleMonitor`: how noisy the gradient of a batch is, and the batch size that the noise asks for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.distributed.shards import is_sharded
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.replay import LossFunction, Replay, halves, leading_size, refuse_replay
from lightning_lowrank.maths.noise_scale import noise_variance, ratio_of_means
from lightning_lowrank.maths.spectra.spectrum import ratio, working_dtype
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Detail, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.source import Batch, Step
from lightning_lowrank.models.names import chosen_parameters
from lightning_lowrank.models.taps import in_training
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of

# Samples that the running means are of.
WINDOW = 20
LONE = "a step of one batch on one process has no parts; accumulate batches, or keep replay=True"
ONCE = "several backward passes of a micro-batch add to one gradient"
UNHEARD = "the gradients of micro-batches were not seen; call backward_done() after each backward pass"


@dataclass
class Parts:
    """The gradients of the micro-batches of one step on this process, as they come.

    Attributes:
        examples: Of each micro-batch, NaN where its batch does not say.
        energy: Sum over micro-batches of the squared norm of their gradient.
        total: Squared norm of what has been added up, over processes too; with a GradScaler's factor, as `energy`.
        before: Gradients that were there when the micro-batch began.
        seen: Parameters whose gradient has come in this micro-batch.
        over: The step has been seen; what comes later is of no use.
    """

    examples: list[float] = field(default_factory=list)
    energy: Tensor | float = 0.0
    total: Tensor | None = None
    before: dict[int, Tensor] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    over: bool = False


class NoiseScale(NumberSource):
    """Variance of the step's gradient, from its parts: micro-batches and processes, or two halves if one batch makes
    the step.

    Args:
        match: Parameters: globs on the full name, `re:REGEX`, `type:LAYERCLASS`.
        exclude: Patterns of what to leave out, as for `match`.
        window: Number of samples in the running means.
        replay: Whether to run a batch again in two halves if it makes a whole step.
        loss_fn: `(module, batch) -> loss`, used instead of `training_step`.

    Raises:
        ValueError: `window` is out of range. In `plan`: a pattern matches nothing, a parameter is sharded, or the step
            cannot be run again. Also if there are several optimizers without `loss_fn`, or with several processes.
    """

    name = "noise"
    level = "functions"
    quantities = (
        Quantity("noise_scale", "examples", estimated=True, detail="core"),
        Quantity("noise_signal_share", estimated=True, detail="core"),
        Quantity("noise_variance"),
        Quantity("noise_gradient_energy"),
        Quantity("noise_examples", "examples"),
        Quantity("noise_samples", detail="all"),
    )

    def __init__(
        self,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        window: int = WINDOW,
        *,
        replay: bool = True,
        loss_fn: LossFunction | None = None,
    ) -> None:
        if type(window) is not int or not 1 <= window <= 10_000:
            raise ValueError(f"window={window!r} must be a number of samples from 1 to 10,000")
        self._match, self._exclude, self._window = match, exclude, window
        self._replays, self._loss_fn = replay, loss_fn
        self._parameters: list[nn.Parameter] = []
        self._hooks: list[RemovableHandle] = []
        self._kept: tuple[Training, int, Replay] | None = None
        self._parts = Parts()
        self._found: Tensor | None = None
        # Of each sample the variance of the step's gradient, the squared norm of the true one, the number of examples.
        self._samples = torch.empty(0, 3, dtype=torch.float64)

    def plan(self, training: Training) -> None:
        """Choose the parameters, and refuse steps without parts."""
        chosen = chosen_parameters(training.module, self._match, self._exclude)
        sharded = next((name for name, parameter in chosen.items() if is_sharded(parameter)), None)
        if sharded is not None:
            raise ValueError(f"NoiseScaleMonitor: {sharded!r} is sharded, but gradients must be read whole; use DDP")
        several = len(training.optimizers) > 1
        if several and (training.team.size > 1 or not self._replays):
            raise ValueError(
                "NoiseScaleMonitor: with several optimizers, a step has several losses. Only a replay "
                "(replay=True, loss_fn=...) in one process can split it"
            )
        if self._replays and training.team.size == 1:
            refuse_replay(training, self._loss_fn)
        self._parameters = [p for p in chosen.values() if p.requires_grad and not is_lazy(p)]

    def batch_begins(self, batch: Batch) -> None:
        """Wait for the gradients of this micro-batch."""
        if self._parts.over:
            self._parts, self._found = Parts(), None
        self._parts.seen.clear()
        if not self._parts.examples:
            self._keep(batch)
        else:
            self._parts.before = {id(p): p.grad.detach().clone() for p in self._parameters if p.grad is not None}
        self._parts.examples.append(float(leading_size(batch.data) or torch.nan))
        self._unhook()
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._parameters]

    def backward_done(self) -> None:
        """Add what has been summed over processes so far."""
        if self._parts.seen and not self._parts.over:
            self._parts.total = self._energy(p.grad for p in self._parameters)

    def gradients_final(self, step: Step) -> list[Any]:
        """The last micro-batch is over, and the weights are still those of its gradient."""
        parts, self._parts = self._parts, Parts(over=True)
        if parts.over or self._kept is None:
            return []
        training, seed, whole = self._kept
        if len(training.optimizers) > 1 or (training.team.size == 1 and len(parts.examples) == 1):
            self.trouble = None  # of parts that are of no use
            self._found = self._of_halves(training, seed, whole)
        elif parts.total is None:
            raise ValueError(UNHEARD)
        elif self.trouble is None:
            scale = 1.0 if step.scale is None else step.scale
            final = self._energy(p.grad for p in self._parameters) / scale**2
            self._found = self._of_parts(parts, ratio(final, parts.total))
        return []

    def batch_over(self) -> None:
        """Stop waiting; a batch without a backward pass is not a part."""
        self._unhook()
        if not self._parts.seen and self._parts.examples and not self._parts.over:
            self._parts.examples.pop()

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Means over the window, of all processes together."""
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        lost = torch.full((5,), torch.nan, dtype=working_dtype(device), device=device)
        found = team.all_reduce(lost if self._found is None else self._found)
        sample = self._settled(found)
        self.detach()
        self._samples = torch.cat([self._samples.to(sample), sample[None]])[-self._window :]
        return [self._numbers(sample)]

    def detach(self) -> None:
        """Stop waiting, and drop the unfinished sample."""
        self._unhook()
        self._kept, self._parts, self._found = None, Parts(), None

    def state_dict(self) -> dict[str, Any]:
        """The samples of the window."""
        return {"samples": self._samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load them."""
        self._samples = state.get("samples", torch.empty(0, 3, dtype=torch.float64))

    def note(self) -> str:
        """The parts of a step."""
        halved = "; if a step has only one batch, it is run again in two halves"
        return f"of the parts of a step{halved if self._replays else ''}"

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_parameters": [], "_hooks": [], "_kept": None, "_parts": Parts(), "_found": None}

    def _arrived(self, parameter: Tensor) -> None:
        """A parameter has the gradient of this micro-batch of this process; called by the user's backward pass."""
        if self._parts.over or not in_training():
            return
        with self.timed(), torch.no_grad():
            try:
                if id(parameter) in self._parts.seen:
                    raise ValueError(ONCE)
                self._parts.seen.add(id(parameter))
                before, gradient = self._parts.before.pop(id(parameter), None), parameter.grad
                own = gradient if before is None or gradient is None else gradient - before
                self._parts.energy = self._parts.energy + self._energy([own])
            except Exception as error:  # this runs inside the user's backward pass
                self.trouble = self.trouble or error.with_traceback(None)

    def _of_parts(self, parts: Parts, unscaled: Tensor) -> Tensor:
        """What is to be summed over processes: energies of parts that add up to the step's gradient, counts."""
        count = len(parts.examples)
        like = torch.zeros_like(unscaled)
        assert parts.total is not None
        mean = count * parts.energy * unscaled
        small = sum(1 / num_examples for num_examples in parts.examples) / count
        return torch.stack([mean, parts.total * unscaled, like + 1, like + count, like + small])

    def _keep(self, batch: Batch) -> None:
        """Keep a copy of the batch, if it may have to be run again."""
        whole = Replay(self._loss_fn)
        if self._replays and batch.training.team.size == 1:
            whole.keep(batch.data, batch.index)
        self._kept = (batch.training, batch.seed, whole)

    def _of_halves(self, training: Training, seed: int, whole: Replay) -> Tensor:
        """The same of the two halves of a batch, each with random numbers of its own."""
        if not self._replays:
            raise ValueError(LONE)
        both, small = [], 0.0
        for i, half in enumerate(halves(whole.batch)):
            replay = Replay(self._loss_fn, seed=2 * seed + i)
            replay.keep(half, whole.batch_idx)
            with replay.loss(training) as loss:
                both.append(torch.autograd.grad(loss, self._parameters, allow_unused=True))
            small += 0.5 / (leading_size(half) or torch.nan)
        energy = (self._energy(both[0]) + self._energy(both[1])) / 2
        means = ([g for g in pair if g is not None] for pair in zip(*both, strict=True))
        total, like = self._energy(sum(pair) / 2 for pair in means if pair), torch.zeros_like(energy)
        return torch.stack([energy, total, like + 1, like + 2, like + small])

    def _settled(self, found: Float[Tensor, "5"]) -> Float[Tensor, "3"]:
        """Variance, energy of the true gradient, and examples of the step, from what all processes found."""
        mean, total, num_processes, count, small = found
        variance = noise_variance(mean / num_processes, total / num_processes, count)
        return torch.stack([variance, total / num_processes - variance, count * num_processes / small])

    def _numbers(self, sample: Float[Tensor, "3"]) -> Numbers:
        variance, energy, examples = self._samples.unbind(-1)
        scale = ratio_of_means(variance * examples, energy)
        share = ratio_of_means(energy, energy + variance)
        there = self._samples[:, :2].isfinite().all(-1)
        means = torch.where(there[:, None], self._samples[:, :2], 0.0).sum(0) / there.sum()
        values = {
            "noise_scale": scale.value,
            "noise_signal_share": share.value,
            "noise_variance": means[0],
            "noise_gradient_energy": means[1],
            "noise_examples": sample[2],
            "noise_samples": there.sum().to(sample),
        }
        errors = {"noise_scale": scale.error, "noise_signal_share": share.error}
        sound = sample[:2].isfinite().all()
        blank = ({name: torch.where(sound, x, torch.nan) for name, x in rows.items()} for rows in (values, errors))
        return Numbers(WHOLE_MODEL, *blank)

    def _energy(self, gradients: Iterable[Tensor | None]) -> Tensor:
        """Sum of squares of some gradients."""
        device = self._parameters[0].device
        dtype = working_dtype(device)
        found = [torch.zeros((), dtype=dtype, device=device)]
        for gradient in gradients:
            if gradient is not None:
                dense = gradient.detach().coalesce().values() if gradient.is_sparse else gradient.detach()
                norm = torch.linalg.vector_norm(dense, dtype=dtype if dense.is_floating_point() else None)
                found.append(norm.to(found[0]))
        return torch.stack(found).square().sum()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class NoiseScaleMonitor(Monitor):
    """The gradient noise scale: how noisy the gradient of a batch is, and up to which size larger batches are useful.

    Below the noise scale a batch of twice the size makes nearly twice the progress per step; far above it, hardly any
    more. It is estimated from gradients of several parts of a step: micro-batches under accumulation, processes under
    data parallelism, or both. A batch that makes a whole step is run again in two halves, and all state that this
    changes is restored. It is the simple noise scale, which assumes equal curvature in all directions.

    Writes `noise/scale`, in examples, and `noise/signal_share`, up to 1: the share of the true gradient in the squared
    norm of the step's gradient. It is also the ratio of the progress of a step to the greatest possible progress. Both
    are ratios of means over the last `window` samples, with errors. If `noise/scale` is NaN and the share at most 0,
    the window is too short to distinguish the gradient from its noise.

    Cost: if a step has several parts, three passes over gradients, and a copy of them under accumulation. Otherwise
    about one training step per sample, without compilation, and temporarily twice the memory of the gradients.

    Args:
        every_n_steps: Cadence in optimizer steps; default 100.
        match: Parameters whose gradient is used: globs, `re:REGEX`, `type:LAYERCLASS`; all trained ones by default.
        exclude: Patterns of what to leave out, as for `match`.
        window: Number of samples in the running means.
        replay: Whether to run a batch again in two halves if it makes a whole step. If False, such steps give no
            number. If True, steps that cannot be run again raise an error.
        loss_fn: `(module, batch) -> loss`, used instead of `training_step` for the halves.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Has no effect, because there are no sites.
        name: Prefix of all tags.
        alerts: Alert rules; none by default.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of range; when training starts: a pattern matches nothing, parameters are sharded,
            or the step cannot be run again; the message says what to do.

    Examples:
        >>> NoiseScaleMonitor(every_n_steps=10).recorders[0].quantities[:2]
        ['noise_scale', 'noise_signal_share']

    References:
        McCandlish et al. (2018), An Empirical Model of Large-Batch Training, arXiv 1812.06162: B_simple, equation 2.9,
        and Appendix A.1.
    """

    word = "noise"

    def __init__(
        self,
        every_n_steps: int | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        window: int = WINDOW,
        replay: bool = True,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = None,
        max_overhead: float | None = None,
    ) -> None:
        source = NoiseScale(match, exclude, window, replay=replay, loss_fn=loss_fn)
        probes = probe_of(source, cadence(every_n_steps, max_overhead, 100))
        super().__init__(probes, detail=detail, per_site=per_site, alerts=alerts, name=name)

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """None, since noise of the gradient depends on the batch size."""
        return []
