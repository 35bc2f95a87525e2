"""What torch does, seen operator by operator: who waits for a device, and who takes memory."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lowrank.watching.watch import Watch

# Bytes below which memory is not counted.
SMALL = 8192


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers read from tensors there, and copies to it or from it."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
    COPIES = ("_to_copy", "copy_", "lift_fresh")

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.seen = device, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        result = function(*args, **(kwargs or {}))
        devices = {part.device.type for part in (*args, result) if isinstance(part, Tensor)}
        if self.device in devices and (name in self.READS or (name in self.COPIES and len(devices) > 1)):
            self.seen[name] += 1
        return result


class Scarce(TorchDispatchMode):
    """Counts memory that operators take, and raises where there is to be none.

    Args:
        refuses: Number of an allocation and its bytes -> whether it fails.
    """

    def __init__(self, refuses: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.refuses, self.count = refuses, 0
        self._taken: list[tuple[StorageWeakRef, int]] = []

    def in_use(self) -> int:
        """Bytes of tensors that are still there, small ones left out."""
        self._taken = [(storage, size) for storage, size in self._taken if not storage.expired()]
        return sum(size for _, size in self._taken)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        result = function(*args, **kwargs or {})
        for new in (t.untyped_storage() for t in _tensors(result)):
            if new.nbytes() and new.data_ptr() not in given:
                self.count += 1
                if self.refuses(self.count - 1, new.nbytes()):
                    raise torch.OutOfMemoryError(f"no {new.nbytes()} bytes left")
                if new.nbytes() >= SMALL:
                    self._taken.append((StorageWeakRef(new), new.nbytes()))
        return result


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type != "meta"]


@contextmanager
def within_monitors(mode: TorchDispatchMode) -> Iterator[None]:
    """What monitors do is done under a mode, what the user does is not."""
    guard = Watch._guard

    @contextmanager
    def guarded(watch: Watch, **options: Any) -> Iterator[None]:
        with guard(watch, **options), mode:
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "_guard", guarded)
        yield
