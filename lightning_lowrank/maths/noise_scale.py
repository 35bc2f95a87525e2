"""Gradient noise from the gradients of parts of a batch.

Shape letters:  S samples
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.operators.estimates import Estimate, student


def noise_variance(
    mean_energy: Float[Tensor, "*B"], energy_of_mean: Float[Tensor, "*B"], num_parts: Float[Tensor, "*B"]
) -> Float[Tensor, "*B"]:
    """Variance of the mean of the gradients of some parts of a batch, summed over parameters.

    Without bias where the parts are drawn independently, of any sizes. `energy_of_mean` less this is the squared norm
    of the true gradient, without bias too: with two parts it is their scalar product.

    Args:
        mean_energy: Mean over parts of the squared norm of their gradient.
        energy_of_mean: Squared norm of the mean of their gradients.
        num_parts: How many; NaN of a single one.

    Returns:
        At least 0, up to rounding.

    Examples:
        >>> noise_variance(torch.tensor(3.0), torch.tensor(2.0), torch.tensor(2.0))
        tensor(1.)

    References:
        McCandlish et al. (2018), An Empirical Model of Large-Batch Training, arXiv 1812.06162, Appendix A.1, whose S is
        this times the size of the batch.
    """
    return (mean_energy - energy_of_mean) / torch.where(num_parts > 1, num_parts - 1, torch.nan)


def ratio_of_means(numerators: Float[Tensor, "S"], denominators: Float[Tensor, "S"]) -> Estimate:
    """Ratio of the means of pairs, which are independent of each other; never the mean of the ratios, which is biased.

    Args:
        numerators: One per sample; samples in which either is not finite do not count.
        denominators: As many.

    Returns:
        NaN where the mean of the denominators is not above 0. The error is by the jackknife, at Student's width; NaN of
        a single sample.

    Examples:
        >>> ratio_of_means(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).value
        tensor(2.)

    References:
        Efron (1982), The Jackknife, the Bootstrap and Other Resampling Plans, Chapter 3.
    """
    there = numerators.isfinite() & denominators.isfinite()
    count = there.sum()
    above, below = (torch.where(there, x, 0.0) for x in (numerators, denominators))
    value = above.sum() / torch.where(below.sum() > 0, below.sum(), torch.nan)
    without = (above.sum() - above) / (below.sum() - below)
    mean = torch.where(there, without, 0.0).sum() / count
    spread = torch.where(there, (without - mean).square(), 0.0).sum() * (count - 1) / count
    width = student(len(numerators)) if len(numerators) > 1 else math.nan
    return Estimate(value, torch.where(count > 1, width * spread.sqrt(), torch.nan))
