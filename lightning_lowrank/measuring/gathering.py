"""Readings made whole: from what each process has to matrices on the one that measures them.

Shape letters:  B any batch axes   M rows, N columns of a matrix   S the short side
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_lowrank.distributed.shards import is_sharded, local, of_local, sharded_axes
from lightning_lowrank.distributed.team import Team, in_rounds
from lightning_lowrank.maths.spectra.decompose import SKETCH_ABOVE
from lightning_lowrank.maths.spectra.spectrum import Spectrum, from_gram, full_precision, working_dtype
from lightning_lowrank.measuring.source import Reading


@dataclass(frozen=True)
class Gathered:
    """The matrices `[*B, M, N]` that a process measures, or a spectrum if only that is known, and the weights to
    compare with.
    """

    labels: tuple[str, ...]
    value: Tensor | Spectrum
    weight: Tensor | Spectrum | None = None
    rounded: bool = False

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the matrices."""
        return self.value.shape

    @property
    def num_bytes(self) -> int:
        """Size of a copy."""
        return sum(t.numel() * t.element_size() for t in (self.value, self.weight) if isinstance(t, Tensor))

    def kept(self) -> "Gathered":
        """A copy that does not change with the parameters and gradients that it is a view of."""
        value, weight = (t.clone() if isinstance(t, Tensor) else t for t in (self.value, self.weight))
        assert value is not None
        return Gathered(self.labels, value, weight)


def gather(
    readings: Sequence[Reading], owners: Sequence[int], team: Team, *, spectra_only: bool, beside: bool
) -> Iterator[list[Gathered]]:
    """What of these readings is this process's to measure, as many at once as `in_rounds` lets move.

    Communicates where tensors are sharded, in one collective a round, which all processes take to the end. What cannot
    be read or made is left out; whoever misses it counts it as lost. What else goes wrong in a round is raised after
    the last, for which the others wait.

    Args:
        readings: The same on every process but for their parts.
        owners: Who measures each.
        team: The processes.
        spectra_only: Nothing but singular values is asked for, so that of a tall sharded matrix only Gram matrices have
            to move.
        beside: Also the weights beside them.
    """
    trouble: Exception | None = None
    for members in in_rounds([_size(reading) for reading in readings], owners):
        part, of = [readings[i] for i in members], [owners[i] for i in members]
        try:
            taken = [_gathered(part, of, team, spectra_only=spectra_only, beside=beside)]
        except Exception as error:
            trouble, taken = error.with_traceback(None), [[]]
        # Handed over, so that nothing here holds it while the next round is gathered.
        yield taken.pop()
    if trouble is not None:
        raise trouble


def _gathered(
    readings: Sequence[Reading], owners: Sequence[int], team: Team, *, spectra_only: bool, beside: bool
) -> list[Gathered]:
    """What of one round is this process's."""
    weights = [reading.weight for reading in readings if reading.weight is not None] if beside else []
    assert len(weights) in (0, len(readings))
    every = [_complete(reading) for reading in (*readings, *weights)]
    every = [_condensed(reading) if spectra_only else reading for reading in every]
    whole = team.gather([reading.parts for reading in every], [*owners] * (1 + bool(weights)))
    made = [_made(reading, parts) for reading, parts in zip(every, whole, strict=True)]
    partners = made[len(readings) :] or [None] * len(readings)
    return [
        Gathered(reading.labels, value, weight, reading.rounded)
        for reading, value, weight in zip(readings, made, partners, strict=False)
        if reading.parts and value is not None and (weight is not None or not weights)
    ]


def _size(reading: Reading) -> int:
    """Bytes of what is sharded, whole; the same on every process, whether it could read its own part or not."""
    like = reading.like or reading.parts
    return sum(t.numel() * (reading.dtype or t.dtype).itemsize for t in like if is_sharded(t))


def _complete(reading: Reading) -> Reading:
    """Something to send in the place of shards that this process could not read: the others wait for them."""
    if reading.parts or not any(map(is_sharded, reading.like)):
        return reading
    return replace(
        reading, parts=[torch.full_like(t.detach(), torch.nan, dtype=reading.dtype or t.dtype) for t in reading.like]
    )


def _condensed(reading: Reading) -> Reading:
    """The same spectrum from Gram matrices to be added up, where the short side is not sharded and they are smaller
    than the shards.
    """
    part = reading.parts[0] if len(reading.parts) == 1 and not reading.rounded else None
    if part is None or not is_sharded(part) or not len(reading.shape) == part.ndim == 2 or part.element_size() > 4:
        return reading
    tall = int(part.shape[1] > part.shape[0])
    axes, count = sharded_axes(part)
    short, shard_bytes = min(part.shape), part.numel() * part.element_size() // count
    if axes != {tall} or short > SKETCH_ABOVE or 8 * short**2 >= shard_bytes:
        return reading
    shape = (reading.shape[0], reading.shape[1])
    return replace(reading, parts=[of_local(_gram(reading, part, tall), part)], make=partial(from_gram, shape=shape))


def _gram(reading: Reading, part: Tensor, tall: int) -> Tensor:
    """Of what this process has of a matrix that is sharded along its longer axis: NaN where it cannot be had."""
    short, dtype = min(part.shape), working_dtype(part.device)
    with full_precision(part.device), suppress(Exception):
        rows = reading.make(local(part))
        assert isinstance(rows, Tensor)
        # `make` may transpose.
        rows = rows.to(dtype) if reading.shape == part.shape else rows.to(dtype).mT
        return rows @ rows.mT if tall else rows.mT @ rows
    return torch.full((short, short), torch.nan, dtype=dtype, device=part.device)


def _made(reading: Reading, parts: Sequence[Tensor] | None) -> Tensor | Spectrum | None:
    with suppress(Exception):
        return reading.make(*parts) if parts else None
    return None
