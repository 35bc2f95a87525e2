"""A kept batch once more through the user's training step, so that nobody else can tell."""

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.output_loss import OutputLoss
from lightning_lowrank.loss.snapshot import Snapshot
from lightning_lowrank.loss.tap import LossTap

LossFunction = Callable[[Any, Any], Tensor]

BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
INSTEAD = "give loss_fn(module, batch) -> loss"
PLAIN = "let the loader give tensors and plain containers"
SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


@dataclass(frozen=True)
class Replayed:
    """What a replay saw.

    Attributes:
        loss: Of the kept batch, as the step returned it, alive: not divided for accumulation, not scaled.
        tap: What went into it.
    """

    loss: Tensor
    tap: LossTap

    def output_loss(self) -> OutputLoss:
        """The loss as a function of the model's outputs; `LossTap.reproduce` says when that is refused."""
        return self.tap.reproduce(self.loss)


@dataclass
class Replay:
    """Runs a training step again, on a kept batch, with everything put back that it changes; `protection.py` says what
    is out of reach.

    Every replay begins with the same random numbers, so that dropout masks stay the same over training. Loggers are
    mute for the module, in `self.log` and through `self.logger`; what it prints is printed. Attention and compiled
    modules run in plain torch, which can be differentiated twice. Backward hooks of the user and hooks of monitors are
    silent.

    Args:
        loss_fn: Takes module and batch and gives the loss, in the place of `training_step`.
        num_examples: Keep only so many, the first, of a batch whose tensors have one leading size; the whole batch
            unless given.
        eval_mode: Run the module in eval mode.
        output_module: Layer whose output is looked at, where the loss functions of torch do not say what went in.
        seed: Of the random numbers; each process has its own.
    """

    loss_fn: LossFunction | None = None
    num_examples: int | None = None
    eval_mode: bool = False
    output_module: nn.Module | None = None
    seed: int = 0
    batch: Any = field(default=None, init=False)
    batch_idx: int = field(default=0, init=False)
    _uncopied: str = field(default="no batch has been kept yet", init=False)

    def keep(self, batch: Any, batch_idx: int = 0) -> None:
        """Take a copy of a batch, for all replays from now on; where it cannot be copied they are refused."""
        self.batch, self.batch_idx = None, batch_idx
        try:
            self.batch = first_examples(copy.deepcopy(batch), self.num_examples)
        except Exception as error:  # batches may be of any class of the user's
            self._uncopied = (
                f"the batch cannot be copied ({type(error).__name__}: {error}), so that it cannot be run again; {PLAIN}"
            )

    def take_back(self, batch: Any, batch_idx: int, device: torch.device) -> None:
        """Go on with a batch that another run kept."""
        self.batch, self.batch_idx = apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device)), batch_idx

    @contextmanager
    def __call__(self, trainer: L.Trainer, module: L.LightningModule) -> Iterator[Replayed]:
        """The loss of the kept batch, with its graph; leaving puts everything back, after an exception too.

        Raises:
            ValueError: There is no batch yet, the step cannot be run again, or it gave no loss.
        """
        if self.batch is None:
            raise ValueError(self._uncopied)
        refuse_replay(module, self.loss_fn)
        _reshard(module)
        snapshot = Snapshot(module, [optimizer.param_groups for optimizer in trainer.optimizers])
        snapshot.attributes_of(trainer)
        with ExitStack() as stack:
            stack.callback(snapshot.restore)
            stack.callback(_reshard, module)
            stack.enter_context(differentiable_twice(module))
            stack.enter_context(seeded(self.seed + trainer.global_rank))
            self._prepare(trainer, module)
            tap = LossTap(self.output_module)
            stack.callback(tap.clear)
            with snapshot.guard(), trainer.precision_plugin.train_step_context(), tap:
                loss = self._loss(module)
            yield Replayed(loss, tap)

    @contextmanager
    def loss(self, trainer: L.Trainer, module: L.LightningModule) -> Iterator[Tensor]:
        """The loss alone."""
        with self(trainer, module) as seen:
            yield seen.loss

    @contextmanager
    def together(self, trainer: L.Trainer, module: L.LightningModule, team: Team) -> Iterator[Replayed]:
        """The same on several processes: what one of them cannot do, none does, for the others would wait for it."""
        with ExitStack() as stack:
            trouble: Exception | None = None
            try:
                seen = stack.enter_context(self(trainer, module))
            except Exception as error:  # the others would wait for this process
                trouble = error
            if not all(team.all_gather_object(trouble is None)):
                raise trouble or RuntimeError("another process could not run its step again")
            yield seen

    def _prepare(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Mute what would be heard outside; all of this is undone by the snapshot."""
        trainer.loggers = [cast(Any, Mute(logger)) for logger in trainer.loggers]
        for part in module.modules():
            if isinstance(part, L.LightningModule):
                # Not by setattr, which users override.
                vars(part).update(log=_nothing, log_dict=_nothing)
            _silence(part)
        for parameter in module.parameters():
            if parameter._backward_hooks:
                parameter._backward_hooks.clear()
        if self.eval_mode:
            module.eval()

    def _loss(self, module: L.LightningModule) -> Tensor:
        # The step may take its batch apart.
        batch = copy.deepcopy(self.batch)
        if self.loss_fn is not None:
            output: Any = self.loss_fn(module, batch)
        else:
            output = module.training_step(*[batch, self.batch_idx][: _num_arguments(module.training_step)])
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"{'the step' if self.loss_fn is None else 'loss_fn'} gave {_described(loss)} instead of a loss"
            )
        return loss.reshape(())


class Mute:
    """A logger that says what it is called and where it writes, and writes nothing."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.experiment = DummyLogger().experiment

    # For `isinstance(self.logger, TensorBoardLogger)`.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._logger, name)
        return _nothing if callable(found) else found


def refuse_replay(module: L.LightningModule, loss_fn: LossFunction | None) -> None:
    """Refuse what cannot be run again.

    Raises:
        ValueError: The step would step optimizers, or takes its own batches; the message says what to do.
    """
    if loss_fn is not None:
        return
    if not module.automatic_optimization:
        raise ValueError(f"training_step cannot be run again: in manual optimization it steps optimizers; {INSTEAD}")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(f"training_step(dataloader_iter) cannot be run again: it takes its own batches; {INSTEAD}")


@contextmanager
def differentiable_twice(module: nn.Module) -> Iterator[None]:
    """Plain torch, on a graph: fused kernels and compiled code have no second derivatives."""
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, Python and numpy that begin at a seed, and afterwards go on as if nothing had been
    drawn.
    """
    with ExitStack() as stack:
        for name in SEEDS:
            stack.callback(_set_environment, name, os.environ.get(name))
        isolation = isolate_rng()
        isolation.__enter__()
        # Left so, since it puts nothing back if it hears of an exception.
        stack.callback(isolation.__exit__, None, None, None)
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "cuda":
            device = torch.get_device_module(accelerator)
            stack.callback(device.set_rng_state, device.get_rng_state())
        seed_everything(seed, verbose=False)
        yield


def first_examples(batch: Any, num_examples: int | None) -> Any:
    """The first examples of a batch whose tensors have one leading size; the whole batch where they do not."""
    sizes: set[int] = set()
    apply_to_collection(batch, Tensor, lambda tensor: sizes.add(len(tensor)) if tensor.ndim else None)
    if num_examples is None or len(sizes) != 1:
        return batch
    return apply_to_collection(batch, Tensor, lambda tensor: tensor[:num_examples].clone() if tensor.ndim else tensor)


def _num_arguments(step: Callable[..., Any]) -> int:
    """How many of batch and its number it takes."""
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2
    return min(2, sum(p.kind is not p.VAR_KEYWORD for p in parameters))


def _silence(part: nn.Module) -> None:
    """Backward hooks, and forward hooks of our own: those of other monitors."""
    for kind in BACKWARD_HOOKS:
        getattr(part, kind).clear()
    for kind in FORWARD_HOOKS:
        hooks = getattr(part, kind)
        for key in [
            key for key, hook in hooks.items() if type(hook).__module__.startswith(f"{__package__.partition('.')[0]}.")
        ]:
            del hooks[key]


def _described(output: Any) -> str:
    """What was given in the place of a loss."""
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}"
    shape = tuple(output.shape)
    return (
        f"a tensor of shape {shape}"
        if output.numel() != 1
        else "a number without a gradient (detached, or under no_grad)"
    )


def _reshard(module: nn.Module) -> None:
    """Without a backward pass FSDP2 keeps some parameters gathered, and would go on with those whatever became of the
    shards.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what would be heard outside."""
