"""Lean of the spectrum."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic

# Of exponents, which are of the order of 1.
ROUNDING = 1e-9


@statistic(unit="1", comparable=False)
def asymmetry(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Logarithm of the left part of the spectrum's width over the right part: `ln((alpha0 - alpha_min) / (alpha_max -
    alpha0))`.

    Args:
        scaling: Of any mode.

    Returns:
        Positive if the spectrum extends further to the left, that is, if neurons with large masses are the unusual
        ones. NaN if there is no spectrum, or if its width is 0.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> asymmetry(multifractal_spectrum(weight, direction="in"))
        tensor(-0.6476, dtype=torch.float64)

    References:
        Xiao, Chen & Bogdan (2021), Scientific Reports 11:22964.
    """
    middle = scaling.alpha_at(0.0)
    left, right = middle - scaling.alpha[..., -1], scaling.alpha[..., 0] - middle
    some = (left > ROUNDING) & (right > ROUNDING)
    return scaling.only_valid(torch.where(some, (left / right).log(), torch.nan))
