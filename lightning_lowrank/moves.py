"""Parameters that are moved for a look at the loss elsewhere, and put back bit for bit."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Put = Callable[[Iterable[Tensor]], None]


@contextmanager
def moving(params: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], Put]]:
    """Where the parameters are, and a function that puts them elsewhere; leaving puts them back, after an exception too."""
    kept = [p.detach().clone() for p in params]

    @torch.no_grad()
    def put(places: Iterable[Tensor]) -> None:
        for p, place in zip(params, places, strict=True):
            p.copy_(place)

    try:
        yield kept, put
    finally:
        put(kept)
