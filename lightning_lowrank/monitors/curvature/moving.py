"""Parameters that are moved for a look at the loss elsewhere, and put back bit for bit."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lightning_lowrank.distributed.shards import local

Put = Callable[[Iterable[Tensor]], None]


@contextmanager
def moving(params: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], Put]]:
    """Where the parameters are, and a function that puts them elsewhere; leaving puts them back, after an exception
    too.

    Of sharded parameters, this process's shards.
    """
    pieces = [local(p) for p in params]
    kept = [piece.clone() for piece in pieces]

    def put(places: Iterable[Tensor]) -> None:
        for piece, place in zip(pieces, places, strict=True):
            piece.copy_(place)

    try:
        yield kept, put
    finally:
        put(kept)
