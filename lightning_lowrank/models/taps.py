"""Listening to layers in the training's own passes, and nowhere else."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

# Takes the name under which a layer is known, the layer, its positional inputs and its output.
Hear = Callable[[str, nn.Module, tuple[Any, ...], Any], None]
Timed = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Tap:
    """A hook before or after a forward pass that hears nothing in a copy of the layer, in a compiled function, or in a
    pass of our own.

    Users copy modules in training, for target networks and averages; a copy's hook must not report to the original.

    Attributes:
        hear: Called with the layer, its inputs and its output, None before there is one; None in a copy.
        ours: It belongs to a pass of our own, and hears that one.
    """

    hear: Callable[..., None] | None
    ours: bool = False
    # How many passes of our own are under way.
    deaf: ClassVar[int] = 0

    def __call__(self, layer: nn.Module, inputs: Any, output: Any = None) -> None:
        # In a compiled function a hook would become part of the graph, or break it.
        if self.hear is not None and (self.ours or in_training()) and not torch.compiler.is_compiling():
            self.hear(layer, inputs, output)

    def __deepcopy__(self, memo: Any) -> "Tap":
        return Tap(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tap, (None,)


@contextmanager
def unheard() -> Iterator[None]:
    """Context of a pass of our own, which no tap hears: forward, backward and products with a kept graph."""
    Tap.deaf += 1
    try:
        yield
    finally:
        Tap.deaf -= 1


def in_training() -> bool:
    """Whether what runs now belongs to the training, and is no pass of our own."""
    return not Tap.deaf


def recomputes() -> bool:
    """Whether a layer runs again inside a backward pass, as under activation checkpointing: the same rows."""
    return torch._C._current_graph_task_id() != -1


class Listener:
    """Hands each output of some layers to a function: on due batches, in the training's own passes.

    What the function raises is kept without its traceback, which would keep tensors alive, until `take_error`.

    Args:
        hear: Called with the layer's name, the layer, its positional inputs and its output.
        again: Hear also the second run of a layer under activation checkpointing.
        ours: Listen in a pass of our own instead of the training's.
        before: Hear inputs before the layer runs, with None for its output.
    """

    def __init__(
        self,
        hear: Hear,
        *,
        again: bool = False,
        ours: bool = False,
        before: bool = False,
    ) -> None:
        self._hear, self._again, self._ours, self._before = hear, again, ours, before
        self._timed: Timed = nullcontext
        self.layers: Mapping[str, nn.Module] = {}
        self._hooks: list[RemovableHandle] = []
        self._error: Exception | None = None

    def plan(self, root: nn.Module, layers: Mapping[str, nn.Module], what: str) -> None:
        """Choose the layers.

        Args:
            root: The module that they are in.
            layers: By the name under which they are heard.
            what: What is listened for, in words of a message.

        Raises:
            ValueError: A layer is inside a compiled module.
        """
        refuse_compiled(root, layers, what)
        self.layers = layers

    def attach(self, timed: Timed = nullcontext) -> None:
        """Listen to this batch.

        Args:
            timed: Counts the time that it takes.
        """
        self._timed = timed
        if not self._hooks:
            self._hooks = [self._tapped(name, layer) for name, layer in self.layers.items()]

    def detach(self) -> None:
        """Stop listening; leave no hook behind."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take_error(self) -> Exception | None:
        """The first error of `hear` since the last query."""
        error, self._error = self._error, None
        return error

    def __getstate__(self) -> dict[str, Any]:
        """A copy listens to no layer until it is planned."""
        return vars(self) | {"layers": {}, "_hooks": [], "_error": None, "_timed": nullcontext}

    def _tapped(self, name: str, layer: nn.Module) -> RemovableHandle:
        # First, for a layer that works in parallel before it takes its output apart.
        parallel = any(isinstance(p, DTensor) for p in layer.parameters(recurse=False))
        tap = Tap(partial(self._heard, name), self._ours)
        return (
            layer.register_forward_pre_hook(tap) if self._before else layer.register_forward_hook(tap, prepend=parallel)
        )

    def _heard(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if recomputes() and not self._again:
            return
        with self._timed():
            try:
                self._hear(name, layer, inputs, output)
            except Exception as error:  # this runs inside the user's forward
                self._error = self._error or error.with_traceback(None)


def refuse_compiled(root: nn.Module, layers: Mapping[str, nn.Module], what: str) -> None:
    """Refuse layers whose hooks never run.

    Args:
        root: The module that they are in.
        layers: By the name that a message is to have.
        what: What is listened for.

    Raises:
        ValueError: One of the layers is inside a compiled module.
    """
    whole = (module for module in root.modules() if compiled(module, "forward", "training_step"))
    inside = {id(part) for module in whole for part in module.modules()}
    for name, layer in layers.items():
        if id(layer) in inside:
            raise ValueError(
                f"{what} of {name!r} cannot be measured, since hooks inside a compiled module never run; match "
                "layers outside of it, or do not compile it"
            )


def refuse_fast_path(root: nn.Module, name: str, what: str, *, evaluates: bool = False) -> None:
    """Refuse a layer whose hook would change the numbers.

    Args:
        root: The module that it is in.
        name: Its name there.
        what: What is listened for.
        evaluates: It is heard in evaluation.

    Raises:
        ValueError: The layer is, or is in, an `nn.TransformerEncoderLayer` that runs in evaluation mode.
    """
    around = [root, *(root.get_submodule(name[:i]) for i, letter in enumerate(f"{name}.") if letter == ".")]
    fast = [module for module in around if isinstance(module, nn.TransformerEncoderLayer)]
    if any(evaluates or not module.training for module in fast):
        raise ValueError(
            f"{what} of {name!r} cannot be measured, since a hook would turn off the fast path of "
            "nn.TransformerEncoderLayer in eval mode; match layers outside of it"
        )


def compiled(part: nn.Module, *methods: str) -> bool:
    """Whether a module, or one of its methods, runs as a graph of `torch.compile`, as far as it shows.

    Args:
        methods: Names of those that are looked at; all unless given.
    """
    if getattr(part, "_compiler_ctx", None) or part._compiled_call_impl is not None or hasattr(part, "_orig_mod"):
        return True
    own = [
        kind
        for kind in type(part).__mro__
        if kind.__module__.partition(".")[0] not in ("torch", "lightning", "builtins")
    ]
    functions = [(name, function) for kind in [part, *own] for name, function in list(vars(kind).items())]
    return any(_is_compiled_function(function) for name, function in functions if not methods or name in methods)


def first_compiled(module: nn.Module) -> str | None:
    """Name of the first compiled part of a module, None where there is none."""
    return next((path or type(module).__name__ for path, part in module.named_modules() if compiled(part)), None)


def _is_compiled_function(function: Any) -> bool:
    # What torch.compiler.disable gives has an original too.
    described: dict[str, Any] = getattr(function, "__dict__", {}) if callable(function) else {}
    return "_torchdynamo_orig_callable" in described and not described.get("_torchdynamo_disable", False)
