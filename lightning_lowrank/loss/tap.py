"""What went into the loss of the user's own training step: the loss functions that it called, or what a named layer put
out.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from lightning_lowrank.loss.calls import FORMS, LossCall, rows_of
from lightning_lowrank.loss.output_loss import Differentiated, OutputLoss
from lightning_lowrank.models.taps import Listener, in_training

# Relative difference between a loss and what it should be, in float32; in less, so many units in the last place.
TOLERANCE, LAST_PLACES = 1e-5, 4

# What sets hooks on a tensor, or asks for its gradient.
HOOKING = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad)

NAMES = ", ".join(f"F.{function.__name__}" for function in FORMS)
INSTEAD = "give the name of the layer whose output enters the loss as output_module"


class LossTap:
    """Listens from `enter` to `exit`; both may be called at any time, any number of times, and raise nothing.

    Not for compiled modules, which would be compiled anew under it.

    Args:
        layer: One whose output to capture, instead of calls of loss functions.
        ours: Listen in a pass of our own instead of the training's.
    """

    def __init__(self, layer: nn.Module | None = None, *, ours: bool = False) -> None:
        self.layer, self._ours = layer, ours
        self.calls: list[LossCall] = []
        self.outputs: list[Tensor] = []
        # Whether the step has set hooks on tensors of its graph, which products with that graph would call.
        self.is_hooked = False
        self._mode = _Listening(self._hear, self._note_hook)
        self._listener = Listener(self._capture, ours=ours)
        self._listener.layers = {} if layer is None else {"": layer}

    def enter(self) -> None:
        """Begin to listen, with nothing heard."""
        self.exit()
        self.clear()
        _push_mode(self._mode)
        if self.layer is not None:
            self._listener.attach()

    def exit(self) -> None:
        """Stop listening; what was heard stays."""
        self._listener.detach()
        _take_off(self._mode)

    def clear(self) -> None:
        """Drop everything that was recorded, and its graphs."""
        self.calls, self.outputs, self.is_hooked = [], [], False

    def __enter__(self) -> "LossTap":
        self.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.exit()

    def reproduce(self, loss: Tensor, scale: Tensor | float = 1.0) -> OutputLoss:
        """The loss of a step as a function of the model's outputs; waits for the device once.

        The loss may be what one call gave times constants: accumulation and a GradScaler, weights of the user's, a mask
        and a mean after `reduction="none"`.

        Args:
            loss: Alive.
            scale: What it has been multiplied by since the user's step returned it.

        Raises:
            ValueError: It cannot be had; the message is the reason.
        """
        if self.layer is not None:
            return self._differentiated(loss, scale)
        call, slope = self._only_call(loss)
        found = call.as_output_loss(slope / scale)
        if not bool(_agrees(found.value(), loss.detach() / scale) & (slope >= 0).all()):
            raise ValueError(
                f"the loss is more than {call.name}: another term is added, it is maximised, or it is not a single "
                f"number; {INSTEAD}"
            )
        return found

    def _only_call(self, loss: Tensor) -> tuple[LossCall, Tensor]:
        """The call that the loss comes from, and the derivative of the loss by what it gave."""
        given = [call.loss for call in self.calls]
        slopes = torch.autograd.grad(loss, given, create_graph=True, allow_unused=True) if given else ()
        found = [(call, slope) for call, slope in zip(self.calls, slopes, strict=True) if slope is not None]
        if not found:
            raise ValueError(f"the loss does not come from one of {NAMES}; {INSTEAD}")
        if len(found) > 1:
            raise ValueError(
                f"the loss consists of {len(found)} calls: {', '.join(call.name for call, _ in found)}; {INSTEAD}"
            )
        call, slope = found[0]
        if slope.requires_grad:
            raise ValueError(f"the loss is not {call.name} times a constant; {INSTEAD}")
        return call, slope

    def _differentiated(self, loss: Tensor, scale: Tensor | float) -> Differentiated:
        if len(self.outputs) != 1:
            raise ValueError(
                f"output_module returned {len(self.outputs)} tensors with a graph in this step instead of one"
            )
        (captured,) = self.outputs
        if torch.autograd.grad(loss, captured, retain_graph=True, allow_unused=True)[0] is None:
            raise ValueError("the loss does not depend on the output of output_module")
        return Differentiated(captured, rows_of, loss, scale)

    def _hear(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], loss: Any) -> None:
        # This runs inside the user's step: what cannot be recorded has not been heard.
        with suppress(Exception):
            if self.layer is None and loss.requires_grad and (self._ours or in_training()):
                self.calls.append(LossCall.of(function, args, kwargs, loss))

    def _note_hook(self, hook: Any) -> None:
        # Fabric's own only checks that its backward was called.
        self.is_hooked |= in_training() and not str(getattr(hook, "__module__", "")).startswith("lightning")

    def _capture(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.outputs += [tensor for tensor in _tensors(output)[:1] if tensor.requires_grad]


class _Listening(TorchFunctionMode):
    """Hands on each call of a loss function, with what it gave; and says when a hook is set on a tensor."""

    def __init__(self, hear: Callable[..., None], note_hook: Callable[[Any], None]) -> None:
        super().__init__()
        self._hear, self._note_hook = hear, note_hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FORMS:
            self._hear(func, args, kwargs or {}, result)
        elif func in HOOKING:
            hook = args[1] if len(args) > 1 else None
            self._note_hook(getattr(hook, "func", hook))
        return result


def module_named(module: nn.Module, name: str) -> nn.Module:
    """The submodule of that name.

    Raises:
        ValueError: There is none; the message says what there is.
    """
    there_is: dict[str, nn.Module] = {path: part for path, part in module.named_modules() if path}
    if name not in there_is:
        raise ValueError(f"output_module={name!r} is not a layer; the layers are {list(there_is)}")
    return there_is[name]


def _take_off(mode: TorchFunctionMode) -> None:
    """Off the stack of modes, wherever it is there: the user's step may have put others above it."""
    stack = _get_current_function_mode_stack()
    if mode in stack:
        above = stack[stack.index(mode) + 1 :]
        for _ in (mode, *above):
            _pop_mode()
        for other in above:
            _push_mode(other)


def _tensors(output: Any) -> list[Tensor]:
    """The real ones in what a layer put out."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    parts = output if isinstance(output, tuple | list) else [output]
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def _agrees(found: Tensor, wanted: Tensor) -> Tensor:
    tolerance = max(TOLERANCE, LAST_PLACES * torch.finfo(wanted.dtype).eps)
    return (found - wanted).abs() <= tolerance * wanted.abs()
