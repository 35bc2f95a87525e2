"""State that a training step may change besides gradients, restored bit for bit."""

import gc
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lowrank.loss.variables import SPENT, Variable

# Entries: what is larger is data rather than state, and not looked into. Tensors of any size are safe from what torch
# writes.
LARGE = 1_000_000
# Objects that a snapshot looks at, at most: about a second.
MOST = 300_000

# Objects of classes derived from theirs are no state of the module: Trainers, loggers, datasets, optimizers.
OTHERS = {"lightning", "lightning_fabric", "pytorch_lightning", "torch", "builtins"}
SCALARS = {str, bytes, int, float, complex, bool, type(None)}
OPAQUE = (type, ModuleType, BuiltinFunctionType, *SCALARS)


class Snapshot:
    """The state of everything that can be reached from a module: entries of containers, attributes and slots,
    parameters, buffers and generators. Also containers in the bodies of the user's classes, and variables of enclosing
    functions.

    Objects stay the same; their content is restored. Global variables are out of reach unless they are given.

    Args:
        variables: Global variables.
        roots: Objects where the search begins, by name.

    Raises:
        ValueError: There are more objects than can be kept within a second.

    Attributes:
        spent: Names of objects that cannot be restored: iterators, files, sockets, queues.
    """

    def __init__(self, *, variables: Sequence[Variable] = (), **roots: Any) -> None:
        self.spent: list[str] = []
        self._undo = ExitStack()
        self._tensors: list[Tensor] = []
        # Containers with their contents; in lists, which cost less than a closure each.
        self._mappings: list[tuple[Any, dict[Any, Any]]] = []
        self._collections: list[tuple[Any, list[Any]]] = []
        self._classes: dict[type, dict[str, Any]] = {}
        self._cells: list[tuple[CellType, Any]] = []
        self._variables = [(namespace, name, namespace[name]) for namespace, name in variables]
        with _no_collection():
            self._walk([*((name, value) for _, name, value in self._variables), *roots.items()])

    def _walk(self, waiting: list[tuple[Any, Any]]) -> None:
        seen: set[int] = set()
        while waiting:
            name, value = waiting.pop()
            if isinstance(value, OPAQUE) or id(value) in seen:
                continue
            seen.add(id(value))
            if len(seen) > MOST:
                raise ValueError(
                    f"more than {MOST:,} Python objects can be reached from the module, the last in {_path(name)}, "
                    "which is too many to restore. Keep data in tensors or arrays, or outside of the module"
                )
            waiting += [((name, key), part) for key, part in self._keep(value, name)]

    def guard(self) -> "WriteGuard":
        """A context that saves tensors before they are written to."""
        return WriteGuard(self._tensors, self._undo)

    def attributes_of(self, thing: object) -> None:
        """Keep also which attributes this has, but not what is in them."""
        self._keep_mapping(vars(thing))

    def restore(self) -> None:
        """Put everything back, also if a part of it fails."""
        for put_back, kept in (
            (_put_back_class, list(self._classes.items())),
            (_put_back_collection, self._collections),
            (_put_back_mapping, self._mappings),
            (_put_back_cell, self._cells),
        ):
            self._undo.callback(_for_each, put_back, kept)
        self._undo.callback(_put_back_variables, self._variables)
        self._undo.close()

    def _keep(self, value: Any, name: Any) -> Iterable[tuple[Any, Any]]:
        """Keep what is in this, and give what else to look at, by name."""
        if isinstance(value, Tensor):
            return self._keep_tensor(value)
        if isinstance(value, dict):
            return self._keep_mapping(value)
        if isinstance(value, list | deque | set | bytearray):
            return self._keep_collection(value)
        if isinstance(value, tuple | frozenset):
            return _to_look_into(value)
        if isinstance(value, np.ndarray):
            return self._keep_array(value)
        if isinstance(value, SPENT):
            if not getattr(value, "closed", False):
                self.spent.append(_path(name))
            return ()
        if isinstance(value, FunctionType | MethodType | partial):
            return self._keep_function(value)
        return self._keep_object(value)

    def _keep_tensor(self, tensor: Tensor) -> Iterable[tuple[Any, Any]]:
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
        if tensor._backward_hooks is not None:
            self._keep_mapping(tensor._backward_hooks)
        return [("grad", gradient)]

    def _keep_mapping(self, mapping: MutableMapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
        kept: dict[Any, Any] = dict(mapping)
        self._mappings.append((mapping, kept))
        return kept.items() if len(kept) <= LARGE and not set(map(type, kept.values())) <= SCALARS else ()

    def _keep_collection(self, values: Any) -> Iterable[tuple[Any, Any]]:
        kept = list(values)
        self._collections.append((values, kept))
        return () if isinstance(values, bytearray) else _to_look_into(kept)

    def _keep_array(self, array: Any) -> Iterable[tuple[Any, Any]]:
        if array.size <= LARGE and array.flags.writeable:
            self._undo.callback(np.copyto, array, array.copy())
        return ()

    def _keep_object(self, value: Any) -> Iterable[tuple[Any, Any]]:
        kinds = type(value).__mro__
        if isinstance(value, nn.Module):
            # Kernels of normalisation layers write into their buffers and do not say so.
            for buffer in _small(value._buffers.values()):
                self._undo.callback(buffer.data.copy_, buffer.detach().clone())
        elif (draws := _state_of_generator(value)) is not None:
            self._undo.callback(draws)
            return ()
        elif _belongs_to_others(kinds):
            return ()
        attributes = getattr(value, "__dict__", None)
        own = list(self._keep_mapping(attributes)) if isinstance(attributes, dict) else []
        return [
            *own,
            *self._keep_slots(value, kinds),
            *(part for kind in kinds if not _belongs_to_others((kind,)) for part in self._keep_class(kind)),
        ]

    def _keep_slots(self, value: Any, kinds: Sequence[type]) -> list[tuple[str, Any]]:
        """Attributes that are in no dictionary."""
        kept = []
        # Classes written in C have none of their own, and members that nobody can write.
        for kind in (kind for kind in kinds if "__slots__" in vars(kind) and not _belongs_to_others((kind,))):
            for name, slot in vars(kind).items():
                if isinstance(slot, MemberDescriptorType) and hasattr(value, name):
                    kept.append((name, getattr(value, name)))
                    self._undo.callback(slot.__set__, value, kept[-1][1])
        return kept

    def _keep_function(self, function: Any) -> Iterable[tuple[Any, Any]]:
        """What a function carries along: the object that it is bound to, arguments, variables from around it."""
        if isinstance(function, MethodType):
            return [("__self__", function.__self__), ("__func__", function.__func__)]
        if isinstance(function, partial):
            return [("func", function.func), ("args", function.args), ("keywords", function.keywords)]
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        filled = [(name, cell) for name, cell in cells if _is_filled(cell)]
        self._cells += [(cell, cell.cell_contents) for _, cell in filled]
        return [(name, cell.cell_contents) for name, cell in filled]

    def _keep_class(self, kind: type) -> Iterable[tuple[Any, Any]]:
        """Data in the body of a class of the user's, which all of its instances share."""
        if kind in self._classes:
            return ()
        self._classes[kind] = {name: value for name, value in vars(kind).items() if _is_data(name, value)}
        return self._classes[kind].items()


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


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection, which would look at all objects of the process again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _for_each(put_back: Callable[[Any, Any], None], kept: Sequence[tuple[Any, Any]]) -> None:
    """Put back each, also if one of them fails; then raise what the first raised."""
    first: Exception | None = None
    for thing, contents in reversed(kept):
        try:
            put_back(thing, contents)
        except Exception as error:
            first = first or error
    if first is not None:
        raise first


def _put_back_mapping(mapping: MutableMapping[Any, Any], kept: dict[Any, Any]) -> None:
    # Untouched where nothing changed: compiled code looks at the version of a dictionary.
    if _same(mapping, kept) and _same(mapping.values(), kept.values()):
        return
    kind: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict
    for key in [key for key in mapping if key not in kept]:
        kind.__delitem__(mapping, key)
    kind.update(mapping, kept)
    if not _same(mapping, kept):  # their order
        kind.clear(mapping)
        kind.update(mapping, kept)


def _put_back_collection(values: Any, kept: list[Any]) -> None:
    if not _same(values, kept):
        values.clear()
        (values.update if isinstance(values, set) else values.extend)(kept)


def _put_back_variables(kept: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
    for namespace, name, value in kept:
        if name not in namespace or namespace[name] is not value:
            namespace[name] = value


def _put_back_cell(cell: CellType, kept: Any) -> None:
    if not _is_filled(cell) or cell.cell_contents is not kept:
        cell.cell_contents = kept


def _put_back_class(kind: type, kept: dict[str, Any]) -> None:
    now = {name: value for name, value in vars(kind).items() if _is_data(name, value)}
    for name in now.keys() - kept.keys():
        delattr(kind, name)
    for name, value in kept.items():
        if name not in now or now[name] is not value:
            setattr(kind, name, value)


def _is_data(name: str, value: Any) -> bool:
    """Whether an entry in the body of a class is data, and no method, property or the like."""
    return not name.startswith("__") and not callable(value) and not hasattr(type(value), "__get__")


def _to_look_into(values: Sequence[Any] | frozenset[Any]) -> Iterable[tuple[Any, Any]]:
    """The entries of a collection, by number; none where they are many, or plain numbers and words."""
    return enumerate(values) if len(values) <= LARGE and not set(map(type, values)) <= SCALARS else ()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # the variable has no value yet
        return False


def _path(name: Any) -> str:
    """The name of what was reached, from the nested pairs of the walk."""
    keys: list[str] = []
    while isinstance(name, tuple):
        name, key = name
        keys.append(f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]")
    return "".join([str(name), *reversed(keys)])


@cache
def _written(function: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operator writes to."""
    # Operators that take functions have no schema.
    arguments = enumerate(function._schema.arguments if hasattr(function, "_schema") else ())
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether these are the very same things in the same order."""
    one, other = list(one), list(other)
    return len(one) == len(other) and all(map(is_, one, other))


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
