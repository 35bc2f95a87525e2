"""Change over weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum, ratio
from lightning_lowrank.statistics.registry import statistic


@statistic(unit="1", needs="top", partner="weight", comparable=False)
def weight_ratio(change: Spectrum, weight: Spectrum) -> Float[Tensor, "*B"]:
    """Spectral norm of a change divided by that of the weight before it. For an update or gradient this is the weight
    before the step, for a displacement the weight at the start of the fit.

    Args:
        change: Whole or sketched.
        weight: Of the same site.

    Returns:
        Not negative. NaN if the weight is zero.

    Examples:
        >>> weight_ratio(svd(0.01 * torch.eye(3)), svd(torch.eye(3)))
        tensor(0.0100, dtype=torch.float64)

    References:
        Yang, Simon & Bernstein (2023), arXiv:2310.17813, Condition 1: for feature learning, the ratio of an update must
        not depend on width.
    """
    return torch.where(weight.top == 0, torch.nan, ratio(change.top, weight.top))
