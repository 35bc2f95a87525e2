"""How far the loss could have followed the last update: curvature from forward passes alone."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# How much farther, or less far, the next guess is while only one side of the answer is known.
LEAP = 4.0


def critical_multiple(
    loss_at: Callable[[Float[Tensor, ""]], Float[Tensor, ""]], guess: Float[Tensor, ""], passes: int = 8
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The multiple of the last update beyond which the loss is higher than before it, and how much farther it may be.

    On a quadratic with gradient descent it is 2 / (learning rate * sharpness along the gradient): below 1 the step went too far. The
    search never waits for the device. It finds one crossing, as a rule the first. NaN where the loss is higher (an update that climbs), or
    not (a direction without end), at all multiples that were tried.

    Args:
        loss_at: The loss where the weights are moved by that multiple of the update, from where they were before it.
        guess: Where to begin: the answer of last time, or 1.
        passes: Forward passes, with that at 0; each halves the logarithm of the interval, once both ends are known.

    References:
        Kalra et al. (2026), arXiv 2601.16979, Section 3: the critical learning rate, by exponential and then binary search.
    """
    start = loss_at(torch.zeros_like(guess))
    below, above = torch.zeros_like(guess), torch.full_like(guess, torch.inf)
    at = guess
    for _ in range(passes - 1):
        higher = _is_higher(loss_at(at), start)
        above, below = torch.where(higher, at, above), torch.where(higher, below, at)
        between = (below * above).sqrt()
        at = torch.where(below == 0, above / LEAP, torch.where(torch.isinf(above), below * LEAP, between))
    known = (below > 0) & torch.isfinite(above) & torch.isfinite(start)
    return torch.where(known, at, torch.nan), torch.where(known, above - at, torch.nan)


def along_update(
    params: Sequence[Tensor], start: Sequence[Tensor], loss: Callable[[], Float[Tensor, ""]], guess: Float[Tensor, ""]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The same of parameters that have just been updated; they are moved, and put back bit for bit.

    Args:
        start: What they were before the update.
        loss: At the parameters as they are.
    """
    end = [p.detach().clone() for p in params]

    @torch.no_grad()
    def move(multiple: Tensor) -> None:
        for p, a, b in zip(params, start, end, strict=True):
            p.copy_(a + multiple.to(a.dtype) * (b - a))

    def loss_at(multiple: Tensor) -> Tensor:
        move(multiple)
        return loss()

    try:
        return critical_multiple(loss_at, guess)
    finally:
        with torch.no_grad():
            for p, b in zip(params, end, strict=True):
                p.copy_(b)


def _is_higher(loss: Float[Tensor, ""], start: Float[Tensor, ""]) -> Bool[Tensor, ""]:
    """A loss that is no number is as high as can be."""
    return ~(loss <= start)
