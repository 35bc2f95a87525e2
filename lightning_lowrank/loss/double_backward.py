"""How the user's loss can be differentiated twice: on its own live graph, by a replay, or not at all; and why, in
words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.replay import LossFunction, refuse_replay
from lightning_lowrank.models.taps import first_compiled
from lightning_lowrank.models.training import Training

# Beginnings of the names of nodes in a graph that have no second derivative. In a replay plain torch takes the place of
# the first.
REPLACEABLE = {
    "ScaledDotProductFlash": "its fused attention",
    "ScaledDotProductEfficient": "its fused attention",
    "ScaledDotProductCudnn": "its fused attention",
    "ScaledDotProductFused": "its fused attention",
    "CompiledFunction": "a compiled function",
    "CudnnRnn": "a recurrent layer that cuDNN runs",
}
FINAL = {
    "CheckpointFunctionBackward": "reentrant checkpointing; call checkpoint(..., use_reentrant=False)",
    "FlashAttn": "the kernels of flash-attn; use scaled_dot_product_attention, or attn_implementation='sdpa'",
    "FlexAttention": "the kernels of flex_attention; use scaled_dot_product_attention",
    "_fMHA": "the kernels of xformers; use scaled_dot_product_attention",
    "SyncBatchNorm": "SyncBatchNorm, whose exchange between processes has no derivative; use BatchNorm or GroupNorm",
}
# What the decorator puts in the place of a backward: torch takes its gradients for constants, and does not say so.
ONCE = once_differentiable(lambda ctx: None).__code__
FORWARD_ONLY = "; critical sharpness needs forward passes only and remains"


@dataclass(frozen=True)
class Choice:
    """How to see the loss.

    Attributes:
        mode: "inline": on the live graph, before the backward pass. "replay": by running the step again.
        reason: Why, to be printed.
        only: Why the other way is closed, where it is.
    """

    mode: Literal["inline", "replay"]
    reason: str
    only: str | None = None


def choose(
    training: Training,
    *,
    batch: Literal["live", "fixed"] = "live",
    loss_fn: LossFunction | None = None,
) -> Choice:
    """Choose before training, once strategy and parameters are set up (`on_fit_start`).

    Raises:
        ValueError: The loss cannot be differentiated twice; the message says what to do.
    """
    _refuse(training)
    why = _asked(batch, loss_fn) or _needs_replay(training)
    try:
        refuse_replay(training, loss_fn)
    except ValueError as error:
        if why is not None:
            raise ValueError(
                f"the loss can only be seen by running the step again, because of {why}; but {error}"
            ) from error
        return Choice("inline", "the graph of each step's own loss", str(error))
    return Choice("inline", "the graph of each step's own loss") if why is None else Choice("replay", why)


def look(choice: Choice, loss: Tensor, hooked: str | None = None) -> Choice:
    """Inspect the graph of a loss in each sample: returns the same choice, or a replay.

    Args:
        choice: So far.
        loss: With its graph.
        hooked: What a look at this graph would call of the user's, None for nothing.

    Raises:
        ValueError: There is no second derivative; the message says what to do.
    """
    nodes = list(_nodes(loss))
    names = {node.name() for node in nodes}
    for start, what in FINAL.items():
        if any(name.startswith(start) for name in names):
            raise ValueError(f"the loss cannot be differentiated twice through {what}{FORWARD_ONLY}")
    if (once := _differentiable_once(nodes)) is not None:
        what = f"{once}, whose backward is marked @once_differentiable; write it with differentiable operations"
        raise ValueError(f"the loss cannot be differentiated twice through {what}{FORWARD_ONLY}")
    found = [what for start, what in REPLACEABLE.items() if any(name.startswith(start) for name in names)]
    if choice.mode == "inline" and hooked is not None and not found:
        if choice.only is not None:
            raise ValueError(f"the loss cannot be seen without calling {hooked}; {choice.only}")
        return Choice("replay", hooked)
    if not found:
        return choice
    if choice.mode == "replay":
        raise ValueError(
            f"the loss cannot be differentiated twice through {found[0]}, not even in a replay{FORWARD_ONLY}"
        )
    if choice.only is not None:
        raise ValueError(f"the loss cannot be differentiated twice through {found[0]}; {choice.only}")
    return Choice("replay", found[0])


def look_together(choice: Choice, loss: Tensor, team: Team, hooked: str | None = None) -> Choice:
    """The same for several processes with possibly different graphs: a replay if one of them needs it.

    Raises:
        ValueError: One of them has no second derivative; the message says what to do.
    """
    try:
        found: Choice | str = look(choice, loss, hooked)
    except ValueError as error:
        found = str(error)
    words = team.all_gather_object(found)
    for refusal in (word for word in words if isinstance(word, str)):
        raise ValueError(refusal)
    choices = [word for word in words if isinstance(word, Choice)]
    return next((word for word in choices if word.mode == "replay"), choices[0])


def _refuse(training: Training) -> None:
    for name, parameter in training.module.named_parameters():
        if isinstance(parameter, DTensor):
            why = "second derivatives are lost when its shards are freed"
            raise ValueError(f"{name!r} is sharded: the loss cannot be differentiated twice, {why}{FORWARD_ONLY}")
    for path, part in training.module.named_modules():
        if isinstance(part, nn.SyncBatchNorm) and training.team.size > 1:
            raise ValueError(
                f"{path!r}: the loss cannot be differentiated twice through {FINAL['SyncBatchNorm']}{FORWARD_ONLY}"
            )


def _asked(batch: str, loss_fn: LossFunction | None) -> str | None:
    if loss_fn is not None:
        return "loss_fn, which was given"
    return "the fixed batch" if batch == "fixed" else None


def _needs_replay(training: Training) -> str | None:
    """Why a look at the live graph would see nothing, or leave a trace."""
    module = training.module
    if (why := training.no_live_graph()) is not None:
        return why
    if (path := first_compiled(module)) is not None:
        return f"the compiled module {path!r}"
    if (hooks := hooked(module)) is not None:
        return hooks
    recurrent = (path for path, part in module.named_modules() if isinstance(part, nn.RNNBase) and _on_cuda(part))
    return next((f"{path!r}, which cuDNN runs" for path in recurrent), None)


def hooked(module: nn.Module) -> str | None:
    """Hooks of modules and parameters that a backward pass of our own would call; None where there are none."""
    for path, part in module.named_modules():
        if part._backward_hooks or part._backward_pre_hooks:
            return f"the backward hooks of {path!r}, which would also run"
    names = (name for name, parameter in module.named_parameters() if parameter._backward_hooks)
    return next((f"the hooks of {name!r}, which would also run" for name in names), None)


def _on_cuda(part: nn.Module) -> bool:
    return next(part.parameters()).is_cuda


def _differentiable_once(nodes: Sequence[Any]) -> str | None:
    """Name of the first function whose author says that it has no second derivative."""
    functions = (getattr(type(node), "_forward_cls", None) for node in nodes)
    return next(
        (f.__name__ for f in functions if f is not None and getattr(f.backward, "__code__", None) is ONCE), None
    )


def _nodes(loss: Tensor) -> Iterator[Any]:
    """All of a graph, each once."""
    waiting, seen = [loss.grad_fn], {loss.grad_fn, None}
    while waiting:
        node = waiting.pop()
        if node is not None:
            yield node
            new = {parent for parent, _ in node.next_functions} - seen
            seen |= new
            waiting += new
