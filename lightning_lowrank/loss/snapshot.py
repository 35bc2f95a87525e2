"""What a training step may change besides gradients, put back bit for bit."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Entries: what is larger is data rather than state, and not looked into. Tensors of any size are safe from what torch
# writes.
LARGE = 1_000_000

# Objects of classes derived from theirs are no state of the module: Trainers, loggers, datasets, optimizers.
OTHERS = {"lightning", "lightning_fabric", "pytorch_lightning", "torch", "builtins"}
OPAQUE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, str, bytes, int, float, complex, bool)


class Snapshot:
    """Everything that is reached from a module, as it is: entries of containers and attributes, parameters, buffers,
    generators.

    Objects stay the same, what is in them is put back. Out of reach: global variables and attributes of classes,
    variables of functions, iterators, files.

    Args:
        roots: Where to begin.
    """

    def __init__(self, *roots: Any) -> None:
        self._undo = ExitStack()
        self._tensors: list[Tensor] = []
        self._seen: set[int] = set()
        waiting = list(roots)
        while waiting:
            value = waiting.pop()
            if value is not None and not isinstance(value, OPAQUE) and id(value) not in self._seen:
                self._seen.add(id(value))
                waiting += self._keep(value)

    def guard(self) -> "WriteGuard":
        """What saves tensors from being written to while it is entered."""
        return WriteGuard(self._tensors, self._undo)

    def attributes_of(self, thing: object) -> None:
        """Keep also which attributes this has, but not what is in them."""
        self._keep_mapping(vars(thing))

    def restore(self) -> None:
        """Put everything back, also if a part of it fails."""
        self._undo.close()

    def _keep(self, value: Any) -> Iterable[Any]:
        """Keep what is in this, and say what else to look at."""
        if isinstance(value, Tensor):
            return self._keep_tensor(value)
        if isinstance(value, dict):
            return self._keep_mapping(value)
        if isinstance(value, list | deque | set | bytearray):
            return self._keep_collection(value)
        if isinstance(value, tuple | frozenset):
            return value if len(value) <= LARGE else ()
        if isinstance(value, np.ndarray):
            return self._keep_array(value)
        return self._keep_object(value)

    def _keep_tensor(self, tensor: Tensor) -> Iterable[Any]:
        if not _is_plain(tensor):
            return ()
        self._tensors.append(tensor)
        if not tensor.is_leaf:
            return ()
        data, gradient, learns = tensor.data, tensor.grad, tensor.requires_grad

        def undo() -> None:
            if (tensor.data_ptr(), tensor.shape, tensor.dtype) != (data.data_ptr(), data.shape, data.dtype):
                tensor.data = data
            if tensor.grad is not gradient:
                tensor.grad = gradient
            if tensor.requires_grad != learns:
                tensor.requires_grad_(learns)

        self._undo.callback(undo)
        return (gradient, tensor._backward_hooks)

    def _keep_mapping(self, mapping: MutableMapping[Any, Any]) -> Iterable[Any]:
        kept: dict[Any, Any] = dict(mapping)
        kind: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict

        def undo() -> None:
            # Untouched where nothing changed: compiled code looks at the version of a dictionary.
            if _same(mapping, kept) and _same(mapping.values(), kept.values()):
                return
            for key in [key for key in mapping if key not in kept]:
                kind.__delitem__(mapping, key)
            kind.update(mapping, kept)
            if not _same(mapping, kept):  # their order
                kind.clear(mapping)
                kind.update(mapping, kept)

        self._undo.callback(undo)
        return kept.values() if len(kept) <= LARGE else ()

    def _keep_collection(self, values: Any) -> Iterable[Any]:
        kept = list(values)

        def undo() -> None:
            if not _same(values, kept):
                values.clear()
                (values.update if isinstance(values, set) else values.extend)(kept)

        self._undo.callback(undo)
        return kept if len(kept) <= LARGE and not isinstance(values, bytearray) else ()

    def _keep_array(self, array: Any) -> Iterable[Any]:
        if array.size <= LARGE:
            self._undo.callback(np.copyto, array, array.copy())
        return ()

    def _keep_object(self, value: Any) -> Iterable[Any]:
        if isinstance(value, nn.Module):
            # Kernels of normalisation layers write into their buffers and do not say so.
            for buffer in _small(value._buffers.values()):
                self._undo.callback(buffer.data.copy_, buffer.detach().clone())
        elif (draws := _state_of_generator(value)) is not None:
            self._undo.callback(draws)
            return ()
        elif _belongs_to_others(type(value).__mro__):
            return ()
        attributes = getattr(value, "__dict__", None)
        return self._keep_mapping(attributes) if isinstance(attributes, dict) else ()


class WriteGuard(TorchDispatchMode):
    """Keeps a copy of what some tensors hold just before the first write to it, so that it costs no memory where
    nothing is written.

    Args:
        tensors: Which.
        undo: Is told how to put back what they held.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Sequence[Tensor], undo: ExitStack) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        self._undo = undo

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, name in _written(func):
            written = kwargs.get(name, args[place] if place < len(args) else None)
            for tensor in written if isinstance(written, list | tuple) else [written]:
                if isinstance(tensor, Tensor) and _is_plain(tensor):
                    self._keep(tensor.untyped_storage()._cdata)
        return func(*args, **kwargs)

    def _keep(self, key: int) -> None:
        storage = self._kept.pop(key, None)
        if storage is not None:
            # Of the storage: no version is counted up, so that graphs which hold the tensor stay valid.
            self._undo.callback(storage.copy_, storage.clone())


@cache
def _written(function: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operator writes to."""
    # Operators that take functions have no schema.
    arguments = enumerate(function._schema.arguments if hasattr(function, "_schema") else ())
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether these are the very same things in the same order."""
    one, other = list(one), list(other)
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has a storage of its own kind: no DTensor, no sparse matrix."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided


def _small(buffers: Iterable[Tensor | None]) -> list[Tensor]:
    return [buffer for buffer in buffers if buffer is not None and _is_plain(buffer) and buffer.numel() <= LARGE]


@cache
def _belongs_to_others(kinds: tuple[type, ...]) -> bool:
    return any(kind.__module__.partition(".")[0] in OTHERS for kind in kinds if kind is not object)


def _state_of_generator(value: Any) -> Callable[[], Any] | None:
    """What puts a generator of random numbers back, of torch, Python or numpy; None for other things."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if type(value).__module__ == "random":
        return partial(value.setstate, value.getstate())
    if not type(value).__module__.startswith("numpy"):
        return None
    if hasattr(value, "bit_generator"):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return partial(value.set_state, value.get_state()) if hasattr(value, "set_state") else None
