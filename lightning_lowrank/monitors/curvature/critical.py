"""How far the loss could have followed the last update: curvature from forward passes alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_lowrank.distributed.shards import local
from lightning_lowrank.monitors.curvature.moving import moving

# How much farther, or less far, the next guess is while only one side of the answer is known.
LEAP = 4.0
# Forward passes of the first search: updates of small learning rates could go on a hundred thousand times as far.
COLD = 20
# Of a later one.
WARM = 8
# Guesses farther from 1 than this, either way, are no guesses: where there was no crossing for long, the search begins
# anew.
FAR = 1e12
# Rounding units by which a loss varies that is the same: a sum over a batch.
ROUNDING = 8.0


@dataclass(frozen=True)
class Critical:
    """The step size at which the loss is as high as before the update.

    Attributes:
        multiple: Of the update.
        error: How much farther it may be.
        guess: Where to begin the next search.
    """

    multiple: Float[Tensor, ""]
    error: Float[Tensor, ""]
    guess: Float[Tensor, ""]


def critical_multiple(
    loss_at: Callable[[Float[Tensor, ""]], Float[Tensor, ""]],
    guess: Float[Tensor, ""],
    passes: int = WARM,
    rounding: float = 0.0,
) -> Critical:
    """The multiple of the last update beyond which the loss is higher than before it.

    On a quadratic with gradient descent it is 2 / (learning rate * sharpness along the gradient): below 1 the step went
    too far. The search never waits for the device. It finds one crossing, as a rule the first. NaN where the loss is
    higher (an update that climbs), or not (a direction without end), at all multiples that were tried. It climbs, too,
    where it is lower by more than rounding nowhere, not even half-way to the crossing.

    Args:
        loss_at: The loss where the weights are moved by that multiple of the update, from where they were before it.
        guess: Where to begin: the answer of last time, or 1.
        passes: Forward passes, with that at 0, and one more half-way; each halves the logarithm of the interval, once
            both ends are known.
        rounding: Of the loss, as a share of it.

    References:
        Kalra et al. (2026), arXiv 2601.16979, Section 3: the critical learning rate, by exponential and then binary
        search.
    """
    start = loss_at(torch.zeros_like(guess))
    below, above = torch.zeros_like(guess), torch.full_like(guess, torch.inf)
    at, lowest = guess, start
    for _ in range(passes - 1):
        loss = loss_at(at)
        higher, lowest = _is_higher(loss, start), torch.fmin(lowest, loss)
        above, below = torch.where(higher, at, above), torch.where(higher, below, at)
        between = (below * above).sqrt()
        at = torch.where(below == 0, above / LEAP, torch.where(torch.isinf(above), below * LEAP, between))
    bracketed = (below > 0) & torch.isfinite(above)
    # A loss that climbs is as high as before the update where it has not climbed by a rounding unit.
    falls = start - torch.fmin(lowest, loss_at(below / 2)) > rounding * start.abs()
    known = bracketed & falls & torch.isfinite(start)
    guess = torch.where((at > 1 / FAR) & (at < FAR) & (falls | ~bracketed), at, 1.0)
    return Critical(torch.where(known, at, torch.nan), torch.where(known, above - at, torch.nan), guess)


def along_update(
    params: Sequence[Tensor],
    start: Sequence[Tensor],
    loss: Callable[[], Float[Tensor, ""]],
    guess: Float[Tensor, ""] | None,
) -> Critical:
    """The same for parameters that have just been updated. They are moved, each process its own shards, and restored
    bit for bit.

    Args:
        start: What they were before the update.
        loss: At the parameters as they are.
        guess: Where to begin, None where nothing is known yet: the search is longer then.
    """
    with moving(params) as (end, put):
        begin, passes = (torch.ones(()), COLD) if guess is None else (guess, WARM)

        def between(a: Tensor, b: Tensor, multiple: Tensor) -> Tensor:
            wide = torch.promote_types(torch.float32, a.dtype)
            return a.to(wide) + multiple.to(wide) * (b.to(wide) - a.to(wide))

        def loss_at(multiple: Tensor) -> Tensor:
            put(between(local(a), b, multiple) for a, b in zip(start, end, strict=True))
            return loss()

        limits = torch.finfo(torch.promote_types(torch.float32, end[0].dtype))
        return critical_multiple(loss_at, begin.to(end[0].device), passes, ROUNDING * limits.eps)


def _is_higher(loss: Float[Tensor, ""], start: Float[Tensor, ""]) -> Bool[Tensor, ""]:
    """A loss that is no number is as high as can be."""
    return ~(loss <= start)
