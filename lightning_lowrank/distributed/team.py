"""Processes that share the work: which one measures what, and how it gets whole tensors.

Shape letters:  B any batch axes   M rows, N columns of a matrix
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_lowrank.distributed.shards import Route, assembled, is_sharded, local, of_everyone, size_on

Word = TypeVar("Word")

# Pieces in a message begin at multiples of this, so that any dtype can be read where it lies.
ALIGNMENT = 16
# Bytes that a process may get at once, however small the largest matrix is.
ROUND = 2**26


@dataclass
class Team:
    """The processes of a training, from the view of one of them.

    All of them must call methods that communicate in the same order, whatever the data.

    Attributes:
        rank: Number of this process.
        size: Number of processes; with one, nothing is communicated.
        sees_data: Whether this process has its own batches. With tensor parallelism, several processes have the same.
        loads: Work that each process has got so far.
    """

    rank: int = 0
    size: int = 1
    sees_data: bool = True
    loads: list[float] = field(default_factory=list)

    def assign(self, costs: Sequence[float]) -> list[int]:
        """Which process does which of several pieces of work: the largest first, each to the process with the least."""
        self.loads = self.loads or [0.0] * self.size
        owners = [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[i] = min(range(self.size), key=self.loads.__getitem__)
            self.loads[owners[i]] += costs[i]
        return owners

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in one collective."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather_object(self, word: Word) -> list[Word]:
        """What each process sends. For small objects only, since this waits for the device."""
        words = [word] * self.size
        if self.size > 1:
            dist.all_gather_object(words, word)
        return words

    def summand(self, tensor: Tensor) -> Tensor:
        """What this process adds to a sum that only the owner gets."""
        return tensor if self.size == 1 else of_everyone(tensor)

    def gather(self, groups: Sequence[Sequence[Tensor]], owners: Sequence[int]) -> list[list[Tensor] | None]:
        """Groups of tensors, whole on their owner and None elsewhere; all shards are sent in one collective.

        Each process sends its shards once, to their owners. If the work is evenly shared, it sends and receives at most
        the bytes of all tensors divided by the number of processes that share a tensor.

        Args:
            groups: The same on every process except for the values.
            owners: Owner of each group.
        """
        routes = [Route(t, owner) for group, owner in zip(groups, owners, strict=True) for t in group if is_sharded(t)]
        arrived = iter(
            self._exchanged([t for group in groups for t in group if is_sharded(t)], routes) if routes else []
        )
        whole = [[next(arrived) if is_sharded(t) else local(t) for t in group] for group in groups]
        return [
            [t for t in group if t is not None] if owner == self.rank else None
            for group, owner in zip(whole, owners, strict=True)
        ]

    def _exchanged(self, tensors: Sequence[Tensor], routes: Sequence[Route]) -> Iterator[Tensor | None]:
        """Each tensor whole on its owner, None elsewhere."""
        outgoing, incoming = traffic(routes, self.rank, self.size)
        pieces: list[list[Tensor]] = [[] for _ in range(self.size)]
        for tensor, route in zip(tensors, routes, strict=True):
            if self.rank in route.senders:
                pieces[route.owner].append(_padded(local(tensor)))
        nothing = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
        sent = torch.cat([nothing, *chain.from_iterable(pieces)])
        del pieces
        received = sent.new_empty(sum(incoming))
        dist.all_to_all_single(received, sent, incoming, outgoing)
        del sent
        messages = dict(enumerate(received.split(incoming)))
        for route in routes:
            yield self._unpacked(route, messages) if route.owner == self.rank else None

    def _unpacked(self, route: Route, messages: dict[int, Tensor]) -> Tensor:
        """The next tensor in the messages."""
        pieces = {}
        for sender in route.senders:
            size = size_on(sender, route)
            pieces[sender] = messages[sender][:size].view(route.dtype)
            messages[sender] = messages[sender][_room(size) :]
        return assembled(route, pieces)


def traffic(routes: Sequence[Route], rank: int, size: int) -> tuple[list[int], list[int]]:
    """Bytes that one of the processes sends to each process and receives from each, itself included."""
    outgoing, incoming = [0] * size, [0] * size
    for route in routes:
        if rank in route.senders:
            outgoing[route.owner] += _room(size_on(rank, route))
        if rank == route.owner:
            for sender in route.senders:
                incoming[sender] += _room(size_on(sender, route))
    return outgoing, incoming


def in_rounds(sizes: Sequence[int], owners: Sequence[int]) -> list[list[int]]:
    """Indices of items that are sent together, so that no owner gets more at once than the largest item or `ROUND`
    bytes.

    Args:
        sizes: Bytes of each whole item; 0 if nothing is sent.
        owners: Which process gets each item.
    """
    limit = max([ROUND, *sizes])
    rounds: list[list[int]] = [[]]
    taken: dict[int, int] = {}
    for i, (size, owner) in enumerate(zip(sizes, owners, strict=True)):
        if taken.get(owner, 0) + size > limit:
            rounds.append([])
            taken = {}
        taken[owner] = taken.get(owner, 0) + size
        rounds[-1].append(i)
    return rounds


def _room(num_bytes: int) -> int:
    """Bytes with the padding behind them."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _padded(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as they are sent."""
    plain = tensor.detach().contiguous().flatten().view(torch.uint8)
    missing = _room(len(plain)) - len(plain)
    return torch.cat([plain, plain.new_zeros(missing)]) if missing else plain
