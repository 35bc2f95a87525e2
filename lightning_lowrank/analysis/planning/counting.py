"""Operations of torch, counted one by one on meta tensors."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_lowrank.distributed.shards import local

# Flops of the eigenvalues of a symmetric matrix, in cubes of its side (Golub & Van Loan 2013, 8.3).
EIGENVALUES = 4 / 3
SOLVERS = ("_linalg_eigh", "linalg_eigvalsh", "linalg_eigh")


@dataclass(frozen=True)
class Work:
    """One kind of operation.

    Attributes:
        kind: "products" or "eigenvalues".
        dtype: Of its operands.
        side: The shortest side of the products, the side of the eigenvalues.
    """

    kind: str
    dtype: torch.dtype
    side: int


@dataclass
class Counting(TorchDispatchMode):
    """Counts flops, and the bytes of tensors that are alive at once.

    Attributes:
        flops: By kind of work.
        peak: Most bytes so far of tensors made under it.
    """

    flops: Counter[Work] = field(default_factory=Counter)
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        # Of all that was made since the dead were last counted out.
        self._most = 0

    @property
    def held(self) -> int:
        """Bytes of tensors made under it that are still alive."""
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self._most = sum(size for _, size in self._alive.values())
        return self._most

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {_key(t) for t in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        self._count(function.overloadpacket, args, kwargs, result)
        made = {_key(t): t.untyped_storage() for t in _tensors(result) if _key(t) not in given}
        self._alive |= {key: (StorageWeakRef(storage), storage.nbytes()) for key, storage in made.items()}
        self._most += sum(storage.nbytes() for storage in made.values())
        if self._most > self.peak:
            self.peak = max(self.peak, self.held)
        return result

    def _count(self, packet: Any, args: Any, kwargs: Any, result: Any) -> None:
        first = next(iter(_tensors(args)), None)
        if first is None:
            return
        if packet.__name__ in SOLVERS:
            side = first.shape[-1]
            solved = first.shape[:-2].numel()
            self.flops[Work("eigenvalues", first.dtype, side)] += int(solved * EIGENVALUES * side**3)
        elif packet in flop_registry:
            sides = [length for t in _tensors(args) for length in t.shape[-2:]]
            work = Work("products", first.dtype, min(sides))
            self.flops[work] += flop_registry[packet](*args, **kwargs, out_val=result)


@dataclass
class Moving(TorchFunctionMode):
    """Counts the bytes that functions of torch read and write: of each that makes or changes a tensor, the operands and
    the results. What a function does within, such as the steps of an LSTM, stays in the cache and is not counted.

    Attributes:
        bytes: So far.
    """

    bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = list(_tensors((args, kwargs)))
        versions = [t._version for t in operands]
        result = function(*args, **(kwargs or {}))
        known = set(map(_key, operands))
        made = [t for t in _tensors(result) if _key(t) not in known]
        if made or versions != [t._version for t in operands]:
            self.bytes += sum(t.nbytes for t in (*operands, *made))
        return result


@contextmanager
def counted(counting: Counting) -> Iterator[Counting]:
    """Under it, and with nothing to differentiate."""
    with torch.no_grad(), counting:
        yield counting


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    """What this process has of them."""
    return (local(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
