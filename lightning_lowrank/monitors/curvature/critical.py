"""How far the loss could have followed the last update: curvature from forward passes alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.distributed.shards import local
from lightning_lowrank.monitors.curvature.moving import moving

# How much farther, or less far, the next guess is while only one side of the answer is known.
LEAP = 4.0
# Largest multiple known to be too far, over the largest known not to be, with which the search ends.
RESOLUTION = 1.045
# How far beyond a predicted crossing to look, as a logarithm, so that it is soon enclosed from both sides.
BEYOND = 0.3 * math.log(RESOLUTION)
# Most forward passes beyond those of a bisection, which are for predictions that fail.
SPARE = 3
# Most forward passes of a search, after two of which a bisection of a factor of 4 takes five.
WARM = 7 + SPARE
# Of the first one: updates of small learning rates could go on a hundred thousand times as far.
COLD = 2 * WARM
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

    multiple: float
    error: float
    guess: float


def critical_multiple(
    loss_at: Callable[[float], float], guess: float, passes: int = WARM, rounding: float = 0.0
) -> Critical:
    """The multiple of the last update beyond which the loss is higher than before it.

    On a quadratic with gradient descent it is 2 / (learning rate * sharpness along the gradient): below 1 the step went
    too far. The search finds one crossing, as a rule the first. It takes about six passes in all, and is a bisection
    where the loss is too far from a quadratic.

    NaN where the loss is higher (an update that climbs), or not (a direction without end), at all multiples that were
    tried. It climbs, too, where it is lower by more than rounding nowhere, not even half-way to the crossing.

    Args:
        loss_at: The loss where the weights are moved by that multiple of the update, from where they were before it.
        guess: Where to begin: the answer of last time, or 1.
        passes: Most forward passes, beside that at 0 and one half-way, which is only made where no pass has shown that
            the loss falls.
        rounding: Of the loss, as a share of it.

    References:
        Kalra et al. (2026), arXiv 2601.16979, Section 3: the critical learning rate, by exponential and then binary
        search.
    """
    start = lowest = loss_at(0.0)
    if not math.isfinite(start):
        return Critical(math.nan, math.nan, guess)
    below, above, at, width = 0.0, math.inf, guess, math.inf
    slopes: dict[float, float] = {}  # on average, from 0
    for _ in range(passes):
        loss = loss_at(at)
        lowest, slopes[at] = min(lowest, loss), (loss - start) / at
        # A loss that is no number is as high as can be.
        below, above = (at, above) if loss <= start else (below, at)
        if below == 0 or math.isinf(above):
            at = above / LEAP if below == 0 else below * LEAP
            continue
        if above <= RESOLUTION * below:
            break
        width = min(width / 2, 2 ** (SPARE - 1) * math.log(above / below))
        at = _next(below, above, slopes, width)
    if below == 0 or math.isinf(above):
        return Critical(math.nan, math.nan, at if 1 / FAR < at < FAR else 1.0)
    # A loss that climbs is as high as before the update where it has not climbed by a rounding unit.
    if not start - lowest > rounding * abs(start) and not start - loss_at(below / 2) > rounding * abs(start):
        return Critical(math.nan, math.nan, 1.0)
    at = math.sqrt(below * above)
    return Critical(at, above - at, at if 1 / FAR < at < FAR else 1.0)


def _next(below: float, above: float, slopes: Mapping[float, float], width: float) -> float:
    """Where to look between two multiples: a little beyond the predicted crossing, as seen from the nearer end.

    Args:
        slopes: Of the loss, on average between 0 and each multiple that was tried.
        width: Logarithm of the ratio that the ends may have after this look, whatever it shows.

    References:
        Oliveira & Takahashi (2020), ACM Transactions on Mathematical Software 47(1): interpolation, truncation and
        projection, which is bisection at worst.
    """
    middle = math.sqrt(below * above)
    predicted = _predicted(below, above, slopes)
    off = math.log(predicted / middle) if below <= predicted < above else 0.0
    off = math.copysign(max(abs(off) - BEYOND, 0.0), off)
    reach = max(width - math.log(above / below) / 2, 0.0)
    return middle * math.exp(min(max(off, -reach), reach))


def _predicted(below: float, above: float, slopes: Mapping[float, float]) -> float:
    """Where the mean slope of the loss is 0, on a straight line through both ends, or on a parabola if there is a third
    multiple. NaN if the slopes do not tell.

    On a quadratic the mean slope is a straight line, whose zero is the crossing.
    """
    low, high = slopes[below], slopes[above]
    if not math.isfinite(low) or not math.isfinite(high):
        return math.nan
    steepness, length = (high - low) / (above - below), above - below
    crossing = below - low / steepness if steepness > 0 else math.nan
    others = [multiple for multiple in slopes if multiple not in (below, above) and math.isfinite(slopes[multiple])]
    if not others or not crossing > below:
        return crossing
    third = min(others, key=lambda multiple: abs(math.log(multiple / crossing)))
    bend = ((slopes[third] - high) / (third - above) - steepness) / (third - below)
    steepness -= bend * length
    root = steepness + math.sqrt(max(steepness * steepness - 4 * bend * low, 0.0))
    return below - 2 * low / root if root > 0 else math.nan


def along_update(
    params: Sequence[Tensor],
    start: Sequence[Tensor],
    loss: Callable[[], Float[Tensor, ""]],
    guess: float | None,
) -> Critical:
    """The same for parameters that have just been updated. They are moved, each process its own shards, and restored
    bit for bit. Each pass waits for the device, since what it shows decides where the next one looks.

    Args:
        start: What they were before the update.
        loss: At the parameters as they are, the same on every process.
        guess: Where to begin, None where nothing is known yet: the search may be longer then.
    """
    with moving(params) as (end, put):
        begin, passes = (1.0, COLD) if guess is None else (guess, WARM)

        def between(a: Tensor, b: Tensor, multiple: float) -> Tensor:
            wide = torch.promote_types(torch.float32, a.dtype)
            return a.to(wide) + multiple * (b.to(wide) - a.to(wide))

        def loss_at(multiple: float) -> float:
            put(between(local(a), b, multiple) for a, b in zip(start, end, strict=True))
            return float(loss())

        limits = torch.finfo(torch.promote_types(torch.float32, end[0].dtype))
        return critical_multiple(loss_at, begin, passes, ROUNDING * limits.eps)
