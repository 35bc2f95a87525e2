"""A sample in the making: from the batch in which it is due until every optimizer has stepped."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.distributed.shards import local
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.measuring.recorder import BATCH, Recorder
from lightning_lowrank.measuring.source import Batch, Step
from lightning_lowrank.models.training import Training


class Sampling:
    """Leads the due recorders through the moments of training steps.

    An optimizer that does not step in the due batch (accumulation, a GradScaler that skips, alternating networks) is
    read at its next step.

    Args:
        training: The training that is sampled.
        optimizers: Those that are waited for.
        generator: Of the sketches.
        guard: Context in which to run what the optimizer's hook calls.
        hooks: Where to leave the handles of hooks. They may not be removed while the optimizer calls them: the owner
            does it later.
    """

    def __init__(
        self,
        training: Training,
        optimizers: Sequence[Optimizer],
        generator: torch.Generator,
        guard: Callable[[], AbstractContextManager[None]],
        hooks: list[RemovableHandle],
    ) -> None:
        self.recorders: list[Recorder] = []
        self.num_skipped = 0
        self._training, self._optimizers, self._team = training, optimizers, training.team
        self._generator, self._guard, self._hooks = generator, guard, hooks
        self._pending = set(range(len(self._optimizers)))
        self._has_read_free = False
        self._open: dict[int, Step] = {}
        self._barren: frozenset[int] = frozenset()
        self._done: set[int] = set()
        self._finite: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether every optimizer has been read."""
        return not self._pending

    def join(self, recorders: Iterable[Recorder]) -> None:
        """Add recorders that have become due; all optimizers are read anew."""
        self.recorders += [recorder for recorder in recorders if recorder not in self.recorders]
        self._each(lambda r: r.plan(self._training))
        self._team.loads = []
        self._each(lambda r: r.share(self._team))
        self._pending = set(range(len(self._optimizers)))
        self._has_read_free = False

    def state_dict(self, given: Mapping[str, set[str]]) -> dict[str, Any]:
        """State of an unfinished sample as plain numbers: optimizers awaited, and each recorder's finished sites."""
        sites = {r.name: dict.fromkeys(sorted(given.get(r.name, ())), True) for r in self.recorders}
        return {"optimizers": dict.fromkeys(map(str, sorted(self._pending)), True), "given": sites}

    def resume(self, state: Mapping[str, Any], recorders: Iterable[Recorder]) -> None:
        """Wait for what another sample still waited for."""
        self.join(recorder for recorder in recorders if recorder.name in state["given"])
        self._pending &= {int(index) for index in state["optimizers"]}
        self._has_read_free = len(self._pending) < len(self._optimizers)

    def batch_begins(self, batch: Any, index: int) -> None:
        """A batch is about to enter the module."""
        begins = Batch(self._training, batch, index, self._generator.initial_seed())
        self._each(lambda r: r.probe.source.batch_begins(begins))

    def loss_live(self, loss: Tensor, scale: Tensor | float) -> None:
        """The loss is computed, and multiplied by `scale`; the backward pass is next."""
        self._each(lambda r: r.probe.source.loss_live(loss, scale))

    def backward_done(self) -> None:
        """The backward pass of a batch is over."""
        self._each(lambda r: r.probe.source.backward_done())

    def gradients_final(self, optimizer: Optimizer, scale: Tensor | None) -> None:
        """Read gradients and weights, and wait for the step to happen."""
        index = self._number_of(optimizer)
        if index not in self._pending or index in self._open:
            return  # LBFGS evaluates its closure many times a step
        if all(p.grad is None for g in optimizer.param_groups for p in g["params"]) and self._waits_for_gradients(
            index
        ):
            return
        if self._team.size > 1:  # between batches FSDP2 may have parameters gathered that it steps in shards
            self._each(lambda r: r.plan(self._training))
        step = Step(optimizer, self._to_read(optimizer), scale)
        self._each(lambda r: r.gradients_final(index, step, self._generator, self._team))
        if scale is not None:
            self._finite += [
                torch.isfinite(local(p.grad)).all()
                for g in optimizer.param_groups
                for p in g["params"]
                if p.grad is not None
            ]
        self._open[index] = step
        # Optimizers of the user's may have no hooks: what they did is read when the batch is over.
        with suppress(AttributeError):
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._step_done(index)))

    def _number_of(self, optimizer: Optimizer) -> int:
        """Place of an optimizer among those of the training, which may have been replaced in mid-run."""
        if all(one is not optimizer for one in self._optimizers):
            self._optimizers = list(self._training.optimizers)
            self._pending, self._has_read_free = set(range(len(self._optimizers))), False
        return next((i for i, one in enumerate(self._optimizers) if one is optimizer), -1)

    def _waits_for_gradients(self, index: int) -> bool:
        """Whether a step without any gradient is let pass, for a better one to come: once.

        `training_step` has returned None, which is Lightning's way to skip a batch; or nothing of this optimizer is
        ever used.
        """
        first, self._barren = index not in self._barren, self._barren | {index}
        return first

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step_done(self, index: int) -> None:
        if index not in self._open:
            return
        with self._guard():
            step = self._open.pop(index)
            self._each(lambda r: r.step_done(index, step, self._generator, self._team))
            self._each(lambda r: r.commit(index))
            self._pending.discard(index)
            self._done.add(index)

    def batch_over(self) -> bool:
        """The batch is over: whether an optimizer stepped, so that there is something to report."""
        self._each(lambda r: r.probe.source.batch_over())
        for index in list(self._open):
            if self._training.may_skip:
                self._close(index)
                self.num_skipped += 1
            else:  # an optimizer of the user's that calls no hooks
                self._step_done(index)
        return self._agreed()

    @property
    def is_late(self) -> bool:
        """Whether all is read, and some of it still to be decomposed; not where a step may have been skipped."""
        return self.complete and not self._finite and any(recorder.is_late for recorder in self.recorders)

    def work(self, shares: int = 1) -> None:
        """Do a share of the work that was put off, of so many that are left."""
        self._each(lambda r: r.work(shares))

    def read(self) -> None:
        """Read what belongs to the batches."""
        self._each(lambda r: r.sample_over(self._generator, self._team))
        self._each(lambda r: r.commit(BATCH))
        for recorder in self.recorders:
            if recorder.error is not None:  # it may still hold what belongs to this sample
                recorder.probe.source.detach()

    def report(self) -> dict[str, Tensor]:
        """Everything measured since the last report. `finite`: whether the gradients were, where a fused optimizer may
        have skipped.
        """
        self.work()
        self._pool()
        report = {key: row for recorder in self.recorders for key, row in recorder.report().items()}
        if self._finite:
            report["finite"] = torch.stack(self._finite).all()
        self._finite, self._done = [], set()
        # Outputs of layers belong to the batch: what is still to come are parameters.
        self.recorders = [r for r in self.recorders if r.probe.source.of_parameters]
        return report

    def _pool(self) -> None:
        """Add up what all processes found, in one collective: each has measured its share."""
        if self._team.size == 1:
            return
        device = self._generator.device
        dtype = working_dtype(device)
        lost = (
            torch.stack([~finite for finite in self._finite]).sum() if self._finite else torch.zeros((), device=device)
        )
        vectors = [lost.to(dtype).reshape(1), *(recorder.packed(device) for recorder in self.recorders)]
        parts = self._team.all_reduce(torch.cat(vectors)).split([len(vector) for vector in vectors])
        for recorder, part in zip(self.recorders, parts[1:], strict=True):
            recorder.unpack(part)
        self._finite = [parts[0] == 0] if self._finite else []

    def take_skipped(self) -> int:
        """Steps that a GradScaler skipped since this was last asked."""
        taken, self.num_skipped = self.num_skipped, 0
        return taken

    def abandon(self) -> None:
        """Leave nothing behind, whatever the state."""
        self._open.clear()
        for recorder in self.recorders:
            recorder.abandon()

    @property
    def awaited(self) -> bool:
        """Whether other processes wait for this one, also if it has nothing to tell."""
        return self._team.size > 1

    def _agreed(self) -> bool:
        """Whether an optimizer stepped in any process, which is then through with it in all of them."""
        words = self._team.all_gather_object((sorted(self._done), sorted(self._pending)))
        self._pending.intersection_update(*(pending for _, pending in words))
        return any(done for done, _ in words)

    def _each(self, moment: Callable[[Recorder], object]) -> None:
        """Every recorder for itself: what goes wrong in one costs its numbers, not those of the others."""
        for recorder in self.recorders:
            try:
                moment(recorder)
            except Exception as error:  # of one source, which does no harm to the others
                # In words: the error itself would keep tensors alive.
                recorder.error = f"{type(error).__name__}: {error}"

    def _close(self, index: int) -> None:
        del self._open[index]
        for recorder in self.recorders:
            recorder.discard(index)

    def _to_read(self, optimizer: Optimizer) -> frozenset[int]:
        """Ids of its parameters, and of those that no optimizer has if it is the first of the sample."""
        own = {id(o): {id(p) for g in o.param_groups for p in g["params"]} for o in self._optimizers}
        free = (
            set()
            if self._has_read_free
            else {id(p) for p in self._training.module.parameters()}.difference(*own.values())
        )
        self._has_read_free = True
        return frozenset(own[id(optimizer)] | free)


def plan(recorders: Sequence[Recorder], training: Training) -> tuple[list[str], bool]:
    """Let every recorder choose its sites: what went wrong, and whether all processes have chosen the same.

    Raises:
        ValueError: What the user asked for cannot be had.
    """
    troubles = []
    for recorder in recorders:
        try:
            recorder.plan(training)
        except ValueError:
            raise
        except Exception as error:  # no argument of the user's is wrong: the run goes on without this source
            troubles.append(f"{recorder.name}: {type(error).__name__}: {error}")
    sites = [list(recorder.sites) for recorder in recorders]
    agreed = all(others == sites for others in training.team.all_gather_object(sites))
    return troubles if agreed else [
        *troubles,
        "the processes have different matrices, so nothing is watched",
    ], agreed
