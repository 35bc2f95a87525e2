"""A training loop of the user's own, in plain torch or on Fabric, under watch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.models.taps import in_training
from lightning_lowrank.models.training import Training, device_of
from lightning_lowrank.watching.monitor import Monitor
from lightning_lowrank.watching.trainer import refuse_hidden

# Classes that do nothing but wrap a module, and the name under which they hold it.
WRAPPERS = {"_FabricModule": "_forward_module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


class LoopTraining(Training):
    """A training as a loop of the user's runs it.

    Args:
        called: The module as the loop calls it: plain, or wrapped by Fabric or DDP.
        optimizers: Those that step it, plain or wrapped by Fabric.
        loggers: Anything with `log_metrics(metrics, step)`.
        folder: Where files of this run belong.
        save: Writes a checkpoint at a path.
        total_steps: How many there will be, where that is known.
    """

    def __init__(
        self,
        called: nn.Module,
        optimizers: Sequence[Any] = (),
        loggers: Sequence[Any] = (),
        folder: str = "",
        save: Callable[[str], object] | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.called, self.module = called, _plain(called)
        self.optimizers: list[Optimizer] = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        self._loggers, self._folder, self._save = list(loggers), folder, save
        self.device = device_of(self.module)
        several = dist.is_available() and dist.is_initialized()
        self.team = Team(dist.get_rank(), dist.get_world_size()) if several else Team()
        # A step hook that is silent means that no step was made.
        self.may_skip = all(hasattr(optimizer, "register_step_post_hook") for optimizer in self.optimizers)
        self.total_steps, self.may_save = total_steps, save is not None
        self.num_steps = 0
        self.should_stop = False
        self.metrics: dict[str, float] = {}

    @property
    def step(self) -> int:
        """Number of batches so far in which gradients reached an optimizer."""
        return self.num_steps

    @property
    def loggers(self) -> list[Any]:
        """On the first process."""
        return self._loggers if self.team.rank == 0 else []

    @property
    def folder(self) -> str:
        """The given folder, or that of the first logger."""
        known = (getattr(logger, name, None) for logger in self._loggers for name in ("log_dir", "save_dir"))
        return self._folder or str(next((path for path in known if path), "."))

    def gradient_scale(self, optimizer: Optimizer) -> Tensor | None:
        """The scale that a GradScaler has passed to an optimizer that unscales inside its step."""
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        return scale

    def mirror(self, scalars: Mapping[str, float]) -> None:
        """Keep them, as a Trainer keeps `callback_metrics`."""
        self.metrics |= scalars

    def stop(self) -> None:
        """Raise the flag that the loop asks for."""
        self.should_stop = True

    def save_checkpoint(self, path: str) -> None:
        """Call the given function."""
        assert self._save is not None  # an alert that asks for one is refused before
        self._save(path)

    def refuse_rerun(self) -> None:
        """Refuse: a loop has no step that could be called.

        Raises:
            ValueError: With the way out.
        """
        raise ValueError("your own loop has no training_step to run again")


class Watching:
    """Monitors at work on a loop; `watching` makes one.

    Attributes:
        monitors: Those at work, with `latest`, `failures`, `events`, `overhead`.
    """

    def __init__(self, training: LoopTraining, monitors: Sequence[Monitor]) -> None:
        self._training, self.monitors = training, list(monitors)
        self._watches = [monitor.watch for monitor in monitors]
        self._count = 0
        self._seen: set[int] = set()
        self._hooks: list[RemovableHandle] = []

    @property
    def should_stop(self) -> bool:
        """Whether an alert has asked to stop training."""
        return self._training.should_stop

    @property
    def metrics(self) -> Mapping[str, float]:
        """The latest numbers by tag, as in a Trainer's `callback_metrics`."""
        return self._training.metrics

    def begins(self) -> None:
        """Choose the sites.

        Raises:
            ValueError: What a monitor asks for is not there, or two monitors write the same tags.
        """
        refuse_hidden(None, self._training.called)
        for i, monitor in enumerate(self.monitors):
            for other in self.monitors[:i]:
                monitor.refuse_double(other)
            monitor.watch.begins(self._training)
        for watch in self._watches:
            watch.starts(self._training)

    @contextmanager
    def batch(self, batch: Any = None) -> Iterator[None]:
        """Context for everything that happens with one batch.

        Args:
            batch: The batch, for monitors that run it again with `loss_fn(model, batch)`.
        """
        self.batch_begins(batch)
        try:
            yield
        except BaseException:  # the loop may go on after it
            self._unhook()
            for watch in self._watches:
                watch.batch_failed()
            raise
        self.batch_over()

    def batch_begins(self, batch: Any = None) -> None:
        """The first half of `batch`, for loops that are made of callbacks."""
        self._seen.clear()
        if not self._hooks:
            self._hooks = [
                optimizer.register_step_pre_hook(self._before_step)
                for optimizer in self._training.optimizers
                if hasattr(optimizer, "register_step_pre_hook")
            ]
        for watch in self._watches:
            watch.batch_begins(self._training, batch, self._count)

    def loss(self, loss: Tensor) -> Tensor:
        """Show the loss to monitors before its backward pass, and return it. Pass it undivided and unscaled."""
        for watch in self._watches:
            watch.loss_live(self._training, loss)
        return loss

    def backward_done(self) -> None:
        """Show the gradients of one micro-batch to monitors of gradient noise."""
        for watch in self._watches:
            watch.backward_done()

    def gradients(self, *optimizers: Any) -> None:
        """Show gradients to monitors before the loop clips them; with a GradScaler, unscale them first.

        Without this call, gradients are read when the optimizer steps, after clipping.

        Args:
            optimizers: Whose gradients are final; all unless given.
        """
        for optimizer in optimizers or self._training.optimizers:
            self._final(getattr(optimizer, "optimizer", optimizer))

    def batch_over(self) -> None:
        """The second half of `batch`."""
        self._unhook()
        stepped, self._count = bool(self._seen), self._count + 1
        for watch in self._watches:
            watch.batch_over(self._training)
        self._training.num_steps += stepped

    @contextmanager
    def validation(self) -> Iterator[None]:
        """Context of a validation loop: its time is not counted, and validation features are measured."""
        for watch in self._watches:
            watch.validation_begins(self._training)
        try:
            yield
        finally:
            for watch in self._watches:
                watch.validation_over(self._training)

    def say_if_idle(self) -> None:
        """Warn if the loop has shown no batch."""
        for watch in self._watches if not self._count else ():
            watch.journal.warn_once("no batch was seen; enclose each batch of the loop in `with watch.batch(batch):`")

    def ends(self) -> None:
        """Leave no hook behind."""
        self._unhook()
        for watch in self._watches:
            watch.stops()
            watch.ends()
            watch.forget_resumed()

    def state_dict(self) -> dict[str, Any]:
        """State as plain tensors and numbers, to be saved with that of the model. Also writes the curves to disk."""
        for watch in self._watches:
            watch.save(self._training)
        states = {monitor.place: monitor.state_dict() for monitor in self.monitors}
        return {"steps": self._training.num_steps, "batches": self._count, "monitors": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a run was stopped; call it before the first batch."""
        self._training.num_steps, self._count = state["steps"], state["batches"]
        for monitor in self.monitors:
            if monitor.place in state["monitors"]:
                monitor.load_state_dict(state["monitors"][monitor.place])
                monitor.watch.begins(self._training)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if in_training():
            self._final(optimizer)

    def _final(self, optimizer: Optimizer) -> None:
        if id(optimizer) not in self._seen:
            self._seen.add(id(optimizer))
            for watch in self._watches:
                watch.gradients_final(self._training, optimizer)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


@contextmanager
def watching(
    model: nn.Module,
    optimizer: Any,
    *monitors: Monitor,
    loggers: Sequence[Any] = (),
    folder: str = "",
    save_checkpoint: Callable[[str], object] | None = None,
    max_steps: int | None = None,
) -> Iterator[Watching]:
    """Watch your own training loop, in plain torch or with Fabric.

    Args:
        model: The model that the loop calls; wrappers of Fabric and DDP are allowed.
        optimizer: The optimizer that steps it, or several in a list.
        monitors: What to measure, as for a Trainer. Monitors of the loss get it from `watch.loss`, or compute it with
            `loss_fn` from the batches given to `watch.batch`.
        loggers: Objects with `log_metrics(metrics, step)`: loggers of Lightning or Fabric.
        folder: Where alerts write checkpoints; by default the folder of the first logger.
        save_checkpoint: Writes a checkpoint to a path, for alerts that request one.
        max_steps: Number of steps of the loop, if known; monitors then report the number of samples.

    Raises:
        ValueError: Something that a monitor needs does not exist, two monitors write the same tags, an alert requests a
            checkpoint without `save_checkpoint`, or an argument is invalid.

    Examples:
        >>> from lightning_lowrank import RankMonitor
        >>> net = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with watching(net, optimizer, RankMonitor(every_n_steps=1)) as watch:
        ...     for batch in [torch.ones(3, 4)]:
        ...         with watch.batch(batch):
        ...             watch.loss(net(batch).sum()).backward()
        ...             optimizer.step()
        >>> round(watch.metrics["rank/gradient_stable_rank_median"], 2)
        1.0
    """
    _refuse_strangers(monitors, loggers)
    several = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    watch = Watching(LoopTraining(model, several, loggers, folder, save_checkpoint, max_steps), monitors)
    try:
        watch.begins()
        yield watch
        watch.say_if_idle()
    finally:
        watch.ends()


def _refuse_strangers(monitors: Sequence[Any], loggers: Any) -> None:
    for monitor in monitors:
        if isinstance(monitor, list | tuple):
            raise ValueError(
                "watching() got a list of monitors; put a star before it: watching(model, optimizer, *watch_all())"
            )
        if not isinstance(monitor, Monitor):
            raise ValueError(f"{monitor!r} is not a monitor; expected watching(model, optimizer, RankMonitor(), ...)")
    if isinstance(loggers, str) or not isinstance(loggers, Sequence):
        raise ValueError(f"loggers={loggers!r} must be a list of loggers, such as [CSVLogger('runs')]")
    for logger in loggers:
        if not hasattr(logger, "log_metrics"):
            raise ValueError(f"loggers=[{logger!r}]: a logger needs a method log_metrics(metrics, step)")


def _plain(module: Any) -> nn.Module:
    """The module inside the wrappers of Fabric, DDP and `torch.compile`."""
    while (name := WRAPPERS.get(type(module).__name__)) is not None:
        module = getattr(module, name)
    return module  # type: ignore[no-any-return]
