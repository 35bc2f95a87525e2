"""How unequally units share something, and whether those that have much get more.

All are free of scale, and NaN where there is nothing to compare: fewer than two units, nothing to share, what is
negative or not finite.

Shape letters:  B any batch axes   n units
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import working_dtype

# The largest units that a Hill exponent is of, at least.
FEWEST_LARGEST = 5

# Mean logarithm of the largest over the next unit that an exponent is told from: less is rounding, or a first update of
# Adam.
NARROWEST = 1e-3

# Standard deviation of logarithms that a slope is over, at least.
LEAST_SPREAD = 0.01

# Units that a line or a rank correlation goes through, at least.
FEWEST_UNITS = 3


def gini(values: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    """Mean distance between two units over twice their mean: 0 where all have the same, (n - 1) / n where one has
    everything.

    Examples:
        >>> gini(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor(0.2500, dtype=torch.float64)
    """
    return gini_of_ordered(values.sort(dim=-1).values)


def gini_of_ordered(values: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    """The Gini coefficient of ascending values, without a sort."""
    shares = _shares(values)
    n = shares.shape[-1]
    places = torch.arange(1 - n, n, 2, dtype=shares.dtype, device=shares.device)[:n]
    return (places * shares).sum(-1) / max(n, 1)


def top_share(values: Float[Tensor, "*B n"], share: float = 0.1) -> Float[Tensor, "*B"]:
    """What part the largest tenth of the units has, a fraction of a unit counted as a fraction. Equal units have
    `share`.
    """
    shares = _shares(values).sort(dim=-1, descending=True).values
    count = share * shares.shape[-1]
    whole = int(count)
    return shares[..., :whole].sum(-1) + (count - whole) * shares[..., whole : whole + 1].sum(-1)


def participation_ratio(values: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    """Squared sum over the sum of squares, over n: the part of the units that take part; 1 / n where one has
    everything.
    """
    shares = _shares(values)
    return 1 / (shares.square().sum(-1) * max(shares.shape[-1], 1))


def entropy(values: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    """Entropy of the shares over `log n`: 1 where all have the same, 0 where one has everything."""
    shares = _shares(values)
    return torch.where(shares > 0, -shares * shares.log(), shares).sum(-1) / math.log(max(shares.shape[-1], 2))


def hill_exponent(values: Float[Tensor, "*B n"], share: float = 0.1) -> Float[Tensor, "*B"]:
    """Exponent a of the tail `P(X > x) ~ x ** -a` by the largest tenth: the smaller, the heavier.

    Returns:
        From 0 to 1000. NaN also where the tenth is fewer than five units, where they are within a thousandth of each
        other, or where the next is zero.
    """
    ordered = _shares(values).sort(dim=-1, descending=True).values
    count = int(share * ordered.shape[-1])
    if count < FEWEST_LARGEST:
        return torch.full_like(ordered.sum(-1), torch.nan)
    spread = (ordered[..., :count] / ordered[..., count : count + 1]).log().mean(-1)
    return torch.where((spread > NARROWEST) & spread.isfinite(), 1 / spread, torch.nan)


def matthew_slope(before: Float[Tensor, "*B n"], growth: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    """Slope of `log growth` over `log before`: 0 where all grow alike, 1 where each grows as it is, above 1 where the
    rich get richer.

    What `growth` is of must not be part of `before`, nor the other way round: noise that both have in common would be a
    slope.

    Returns:
        NaN also with fewer than three units above zero in both, or where they differed by less than 1 % before.
    """
    known = (before > 0) & (growth > 0) & before.isfinite() & growth.isfinite()
    x, y = (torch.where(known, values, 1).to(working_dtype(values.device)).log() for values in (before, growth))
    x, y = _centred(x, known), _centred(y, known)
    spread = x.square().sum(-1)
    enough = (known.sum(-1) >= FEWEST_UNITS) & (spread > LEAST_SPREAD**2 * known.sum(-1))
    return torch.where(enough, (x * y).sum(-1) / spread, torch.nan)


def rank_persistence(before: Float[Tensor, "*B n"], after: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
    """Spearman's correlation of the units' ranks; those that are equal share the mean of theirs. By chance 0.

    Returns:
        -1..1. NaN with fewer than three units, or all alike.
    """
    first, second = _ranks(before), _ranks(after)
    first, second = first - first.mean(-1, keepdim=True), second - second.mean(-1, keepdim=True)
    found = (first * second).sum(-1) / (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    sound = torch.isfinite(before).all(-1) & torch.isfinite(after).all(-1) & (before.shape[-1] >= FEWEST_UNITS)
    return torch.where(sound & found.isfinite(), found, torch.nan)


def top_overlap(first: Float[Tensor, "*B n"], second: Float[Tensor, "*B n"], share: float = 0.2) -> Float[Tensor, "*B"]:
    """Units that are among the largest of both, over those that are of one of them (Jaccard); by chance
    `top_overlap_chance`.

    What has nothing is not among the largest, so that there may be fewer of those.

    Returns:
        0..1. NaN where a value is not finite, or all are 0.
    """
    one, other = _largest(first, share), _largest(second, share)
    sound = [values.isfinite().all(-1) & (values != 0).any(-1) for values in (first, second)]
    return torch.where(sound[0] & sound[1], (one & other).sum(-1) / (one | other).sum(-1), torch.nan)


@lru_cache
def top_overlap_chance(n: int, share: float = 0.2) -> Float[Tensor, ""]:
    """Mean of `top_overlap` over all pairs of sets of as many of n units; about `share / (2 - share)` of many."""
    size = num_largest(n, share)
    common = torch.arange(max(0, 2 * size - n), size + 1, dtype=torch.float64)
    ways = _log_choices(float(size), common) + _log_choices(float(n - size), size - common)
    return (ways.softmax(-1) * common / (2 * size - common)).sum()


def num_largest(n: int, share: float) -> int:
    """How many units a share is: at least one."""
    return max(1, math.ceil(share * n - 1e-9))


def _shares(values: Float[Tensor, "*B n"]) -> Float[Tensor, "*B _"]:
    """Each unit's part of the whole; NaN where there is nothing to compare, and a single one where there are fewer than
    two.
    """
    values = values.to(working_dtype(values.device))
    if values.shape[-1] < 2:
        return values.new_full((*values.shape[:-1], 1), torch.nan)
    unit = values / values.amax(-1, keepdim=True)
    return torch.where((values >= 0).all(-1, keepdim=True), unit / unit.sum(-1, keepdim=True), torch.nan)


def _centred(values: Float[Tensor, "*B n"], known: Bool[Tensor, "*B n"]) -> Float[Tensor, "*B n"]:
    """Less the mean of those that are known; the others 0."""
    mean = torch.where(known, values, 0).sum(-1, keepdim=True) / known.sum(-1, keepdim=True)
    return torch.where(known, values - mean, 0)


def _ranks(values: Float[Tensor, "*B n"]) -> Float[Tensor, "*B n"]:
    """From 1 on, twice."""
    values = values.contiguous()
    ordered = values.sort(dim=-1).values
    low, high = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (low + high).to(working_dtype(values.device))


def _largest(values: Float[Tensor, "*B n"], share: float) -> Bool[Tensor, "*B n"]:
    chosen = values.topk(num_largest(values.shape[-1], share), dim=-1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, chosen, True) & (values != 0)


def _log_choices(n: float, k: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    """Logarithm of the ways to choose k of n."""
    return torch.lgamma(torch.tensor(n + 1, dtype=k.dtype)) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
