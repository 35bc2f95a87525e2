"""Where the pieces of a sharded tensor are, and how to assemble the tensor.

A tensor of several processes is a `DTensor` on a mesh of processes. Along each axis of the mesh, it is sharded along
one of its own axes, replicated, or partial (a summand).
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.placement_types import Placement

# Stretches of one axis of a tensor.
Stretches = list[range]


def is_sharded(tensor: Tensor) -> bool:
    """Whether no process has the whole tensor."""
    return isinstance(tensor, DTensor) and not all(placement.is_replicate() for placement in tensor.placements)


def local(tensor: Tensor) -> Tensor:
    """The part of this process."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process. Communicates if it is sharded."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def unspent(tensor: Tensor) -> Tensor:
    """The same tensor, still to be summed by its owner; summing a row-sharded embedding would consume its mask."""
    for placement in getattr(tensor, "placements", ()):
        mask = getattr(placement, "mask_buffer", None)
        if mask is not None and mask.data is not None:
            mask.refcount += 1
    return tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor sharded like another one of its shape; every process has the whole value."""
    if isinstance(tensor, DTensor) or not isinstance(other, DTensor):
        return tensor.to(other.device)
    mesh = other.device_mesh
    at = mesh.get_coordinate()
    assert at is not None
    pieces = _stretches(other.placements, tuple(mesh.mesh.shape), tuple(at), other.shape)
    part = _cut(tensor, pieces).to(local(other).device)
    return DTensor.from_local(part, mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride())


def sharded_axes(tensor: Tensor) -> tuple[set[int], int]:
    """Axes along which it is sharded, -1 for an outstanding sum; and the number of processes."""
    assert isinstance(tensor, DTensor)
    split = [
        (p, n) for p, n in zip(tensor.placements, tensor.device_mesh.mesh.shape, strict=True) if not p.is_replicate()
    ]
    return {getattr(placement, "dim", -1) for placement, _ in split}, prod(count for _, count in split)


def held(tensor: Tensor) -> list[Stretches]:
    """Slice of each axis of a sharded tensor that this process holds; empty if it holds a copy of another's."""
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    at = mesh.get_coordinate()
    if at is None or any(p.is_replicate() and place > 0 for p, place in zip(tensor.placements, at, strict=True)):
        return [[] for _ in tensor.shape]
    return _stretches(tensor.placements, tuple(mesh.mesh.shape), tuple(at), tensor.shape)


def of_local(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor of which each process has a part; the parts are summed where the other tensor is sharded."""
    assert isinstance(other, DTensor)
    placements = [p if p.is_replicate() else Partial() for p in other.placements]
    return DTensor.from_local(tensor, other.device_mesh, placements, run_check=False)


def of_everyone(tensor: Tensor) -> Tensor:
    """The same, summed over all processes."""
    return DTensor.from_local(tensor, _everyone(dist.group.WORLD, tensor.device.type), [Partial()], run_check=False)


class Route:
    """How a sharded tensor reaches its owner: which processes send, and where each piece belongs.

    Attributes:
        senders: Processes that send, with their stretches of the tensor. Of a replicated tensor one copy is sent, from
            the owner's own slice of the mesh.
    """

    def __init__(self, tensor: Tensor, owner: int) -> None:
        assert isinstance(tensor, DTensor)
        self.owner, self.shape, self.dtype = owner, tensor.shape, tensor.dtype
        self.senders, self.divisor = _senders(tensor.device_mesh, tensor.placements, tensor.shape, owner)


def size_on(sender: int, route: Route) -> int:
    """Bytes that one of the senders has."""
    return prod(sum(map(len, axis)) for axis in route.senders[sender]) * route.dtype.itemsize


def assembled(route: Route, pieces: Mapping[int, Tensor]) -> Tensor:
    """The whole tensor from the flat pieces of its senders; summands are added."""
    result: Tensor | None = None
    for sender, stretches in route.senders.items():
        piece = pieces[sender].view([sum(map(len, axis)) for axis in stretches])
        if result is None:
            result = piece.new_zeros(route.shape)
        begins = [_begins(axis) for axis in stretches]
        for place in product(*(zip(axis, begin, strict=True) for axis, begin in zip(stretches, begins, strict=True))):
            there = tuple(slice(there.start, there.stop) for there, _ in place)
            here = tuple(slice(begin, begin + len(there)) for there, begin in place)
            result[there] += piece[here]
    assert result is not None
    return result if route.divisor == 1 else result / route.divisor


@lru_cache
def _everyone(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    """All processes in a row."""
    return DeviceMesh.from_group(group, device_type)


@lru_cache(maxsize=4096)
def _senders(
    mesh: DeviceMesh, placements: tuple[Placement, ...], shape: torch.Size, owner: int
) -> tuple[dict[int, list[Stretches]], int]:
    """Ranks that send to the owner with what they have, and what a sum of averages is divided by."""
    sizes = tuple(mesh.mesh.shape)
    at = dict(zip(map(int, mesh.mesh.flatten()), product(*map(range, sizes)), strict=True))
    home = at.get(owner)
    if home is None:
        return {}, 1
    near = {
        r: c
        for r, c in at.items()
        if all(not p.is_replicate() or a == h for p, a, h in zip(placements, c, home, strict=True))
    }
    divisor = prod(n for p, n in zip(placements, sizes, strict=True) if isinstance(p, Partial) and p.reduce_op == "avg")
    return {rank: _stretches(placements, sizes, place, shape) for rank, place in near.items()}, divisor


def _stretches(
    placements: Sequence[Placement], sizes: Sequence[int], at: Sequence[int], shape: Sequence[int]
) -> list[Stretches]:
    """What a process has of each axis of a tensor, as `torch.chunk` deals it out, one axis of the mesh after the other.

    A strided shard is what a chunk would be had the axis been dealt out in `split_factor` chunks before (FSDP2 over
    tensor parallel).

    Raises:
        ValueError: A placement is neither sharded, nor replicated, nor a sum or an average.
    """
    axes = [[range(length)] for length in shape]
    for placement, count, place in zip(placements, sizes, at, strict=True):
        if hasattr(placement, "dim"):
            first = getattr(placement, "split_factor", 1)
            parts = [_chunk(axes[placement.dim], first, i) for i in range(first)]
            axes[placement.dim] = [stretch for part in parts for stretch in _chunk(part, count, place)]
        elif not (placement.is_replicate() or getattr(placement, "reduce_op", "") in ("sum", "avg")):
            raise ValueError(f"a tensor with the placement {placement} cannot be assembled")
    return axes


def _chunk(axis: Stretches, count: int, place: int) -> Stretches:
    """One of several equal parts of an axis; the last ones are shorter or empty."""
    size = -(-sum(map(len, axis)) // count)
    low, high = place * size, (place + 1) * size
    cut = [s[max(low - begin, 0) : max(high - begin, 0)] for s, begin in zip(axis, _begins(axis), strict=True)]
    return [stretch for stretch in cut if len(stretch)]


def _begins(axis: Stretches) -> list[int]:
    """Where each stretch begins when they are laid one behind the other."""
    lengths = [len(stretch) for stretch in axis]
    return [sum(lengths[:i]) for i in range(len(lengths))]


def _cut(tensor: Tensor, stretches: Sequence[Stretches]) -> Tensor:
    """Those stretches of each axis."""
    for axis, kept in enumerate(stretches):
        tensor = torch.cat([tensor.narrow(axis, 0, 0), *(tensor.narrow(axis, s.start, len(s)) for s in kept)], axis)
    return tensor
