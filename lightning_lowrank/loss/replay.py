"""A kept batch once more through the user's training step, so that nobody else can tell."""

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.loss.output_loss import OutputLoss
from lightning_lowrank.loss.snapshot import Snapshot
from lightning_lowrank.loss.tap import HOOKING, LossTap
from lightning_lowrank.loss.variables import variables
from lightning_lowrank.models.taps import unheard
from lightning_lowrank.models.training import Training

LossFunction = Callable[[Any, Any], Tensor]

BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Packages whose forward hooks look and change nothing.
WATCHERS = {"wandb", "comet_ml", "clearml", "neptune", "mlflow"}
INSTEAD = "give loss_fn(module, batch) -> loss"
PLAIN = "let the loader return tensors and plain containers"


@dataclass(frozen=True)
class Replayed:
    """The result of a replay.

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
    """Runs a training step again, on a kept batch, with everything put back that it changes; `snapshot.py` says what
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
                f"the batch cannot be copied ({type(error).__name__}: {error}), so the step cannot be run again; "
                f"{PLAIN}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The kept batch; nothing where it is no plain nest of tensors, numbers and words."""
        kept = self.batch is not None and _is_plain(self.batch)
        return {"batch": self.batch, "batch_idx": self.batch_idx} if kept else {}

    def resume(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue with a batch that another run has kept."""
        self.batch = apply_to_collection(state["batch"], Tensor, lambda tensor: tensor.to(device))
        self.batch_idx = state["batch_idx"]

    @contextmanager
    def __call__(self, training: Training) -> Iterator[Replayed]:
        """The loss of the kept batch, with its graph; leaving puts everything back, after an exception too.

        Raises:
            ValueError: There is no batch yet, the step cannot be run again, or it gave no loss.
        """
        if self.batch is None:
            raise ValueError(self._uncopied)
        refuse_replay(training, self.loss_fn)
        module = training.module
        _reshard(module)
        step = self.loss_fn or training.step_function
        snapshot = Snapshot(
            variables=variables(step, {type(part) for part in module.modules()}),
            module=module,
            optimizers=[optimizer.param_groups for optimizer in training.optimizers],
            hooks=[getattr(part, kind) for part in module.modules() for kind in FORWARD_HOOKS],
            step=step,
        )
        if snapshot.spent and self.loss_fn is None:
            raise ValueError(
                f"the step cannot be run again: {snapshot.spent[0]} is an iterator, a file, a socket or a queue. A "
                f"replay would consume data from it; {INSTEAD} that reads nothing from it"
            )
        with ExitStack() as stack:
            stack.callback(snapshot.restore)
            stack.callback(_reshard, module)
            stack.enter_context(unheard())
            stack.enter_context(differentiable_twice(module))
            stack.enter_context(seeded(self.seed + training.team.rank))
            stack.enter_context(training.muted(snapshot))
            _silence(module)
            if self.eval_mode:
                module.eval()
            tap = LossTap(self.output_module, ours=True)
            stack.callback(tap.clear)
            # Not around what is made of the loss: the mode would be asked about each of our own calls.
            with snapshot.guard(), training.precision(), _NoHooks(), tap:
                loss = self._loss(training)
            yield Replayed(loss, tap)

    @contextmanager
    def loss(self, training: Training) -> Iterator[Tensor]:
        """The loss alone."""
        with self(training) as seen:
            yield seen.loss

    @contextmanager
    def together(self, training: Training) -> Iterator[Replayed]:
        """The same on several processes. If one of them fails, none continues, since the others would wait for it."""
        with ExitStack() as stack:
            trouble: Exception | None = None
            try:
                seen = stack.enter_context(self(training))
            except Exception as error:  # the others would wait for this process
                trouble = error
            if not all(training.team.all_gather_object(trouble is None)):
                raise trouble or RuntimeError("another process could not run its step again")
            yield seen

    def _loss(self, training: Training) -> Tensor:
        # The step may take its batch apart.
        batch = copy.deepcopy(self.batch)
        rerun = self.loss_fn is None
        output = training.rerun(batch, self.batch_idx) if self.loss_fn is None else self.loss_fn(training.called, batch)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"{'the step' if rerun else 'loss_fn'} returned {_described(loss)} instead of a loss")
        return loss.reshape(())


def refuse_replay(training: Training, loss_fn: LossFunction | None) -> None:
    """Refuse what cannot be run again.

    Raises:
        ValueError: The training's own step cannot be, and no function takes its place; the message says what to do.
    """
    if loss_fn is None:
        try:
            training.refuse_rerun()
        except ValueError as error:
            raise ValueError(f"{error}; {INSTEAD}") from error


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
    """Random numbers of torch, Python and numpy begin at a seed, and afterwards go on as if none had been drawn."""
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.get_device_module(kind).device_count()), device_type=kind):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def first_examples(batch: Any, num_examples: int | None) -> Any:
    """The first examples of a batch whose tensors have one leading size; the whole batch where they do not.

    Lists of words or objects that are as long as the tensors are cut along; a packed sequence is left whole, and the
    batch with it.
    """
    size = leading_size(batch)
    return batch if num_examples is None or size is None else _cut(batch, size, slice(num_examples))


def halves(batch: Any) -> tuple[Any, Any]:
    """Every other example of a batch, and those between; cut as by `first_examples`.

    Raises:
        ValueError: Its tensors have not one leading size, or there is one example.
    """
    size = leading_size(batch)
    if size is None or size < 2:
        there_is = "tensors with different leading sizes" if size is None else "one example"
        raise ValueError(f"a batch of {there_is} cannot be halved")
    return _cut(batch, size, slice(0, None, 2)), _cut(batch, size, slice(1, None, 2))


def leading_size(batch: Any) -> int | None:
    """How many examples a batch has: the one leading size of its tensors, None where they have not one."""
    sizes: set[int] = set()
    packed: list[object] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.add(len(tensor)) if tensor.ndim else None)
    apply_to_collection(batch, PackedSequence, packed.append)
    return next(iter(sizes)) if len(sizes) == 1 and not packed else None


def _cut(batch: Any, size: int, part: slice) -> Any:
    """Tensors, and lists without tensors that are as long, down to some examples."""
    if isinstance(batch, Tensor):
        return batch[part].clone() if batch.ndim else batch
    if type(batch) in (list, tuple):
        if len(batch) == size and not any(isinstance(one, Tensor | Mapping | list | tuple) for one in batch):
            return batch[part]
        return type(batch)(_cut(one, size, part) for one in batch)
    if type(batch) is dict:
        return {key: _cut(one, size, part) for key, one in batch.items()}
    return apply_to_collection(batch, Tensor, lambda tensor: _cut(tensor, size, part))


def _is_plain(batch: Any) -> bool:
    """Whether a checkpoint can hold it that loads with `weights_only=True`."""
    if type(batch) is dict:
        return all(type(key) in (str, int) and _is_plain(part) for key, part in batch.items())
    if type(batch) in (list, tuple):
        return all(map(_is_plain, batch))
    return batch is None or type(batch) in (Tensor, int, float, bool, str)


class _NoHooks(TorchFunctionMode):
    """In the place of hooks that the step sets on tensors, nothing: they would be called by passes of our own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOOKING:
            return RemovableHandle(OrderedDict())
        return func(*args, **(kwargs or {}))


def _silence(module: nn.Module) -> None:
    """Clear backward hooks of the user's, and forward hooks of tools that watch; the snapshot puts them back."""
    for part in module.modules():
        for kind in BACKWARD_HOOKS:
            getattr(part, kind).clear()
        for kind in FORWARD_HOOKS:
            hooks = getattr(part, kind)
            for key in [key for key, hook in hooks.items() if _root(hook) in WATCHERS]:
                del hooks[key]
    for parameter in module.parameters():
        if parameter._backward_hooks:
            parameter._backward_hooks.clear()


def _root(hook: Any) -> str:
    """The package that a hook is from."""
    return str(getattr(hook, "__module__", type(hook).__module__)).partition(".")[0]


def _described(output: Any) -> str:
    """What was given in the place of a loss."""
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}"
    shape = tuple(output.shape)
    return (
        f"a tensor of shape {shape}"
        if output.numel() != 1
        else "a number without a gradient (detached, or computed under no_grad)"
    )


def _reshard(module: nn.Module) -> None:
    """Without a backward pass FSDP2 keeps some parameters gathered, and would go on with those whatever became of the
    shards.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
