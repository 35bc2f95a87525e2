"""How fast the eigenvalues of a covariance fall off.

Shape letters:  B any batch axes   K eigenvalues
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import ratio

# Shares of the number of eigenvalues between which the line is fitted, and how many it takes.
BEGIN, END, LEAST = 0.05, 0.5, 5
# Eigenvalues below this share of the largest are rounding, where the rows are float32.
ROUNDING = 1e-10


def power_law_exponent(eigenvalues: Float[Tensor, "*B K"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """Exponent alpha of `lambda_i ~ i^-alpha`, and the quality of the fit.

    It fits a line to `ln lambda_i` over `ln i`, weighted by `1 / i` so that each octave counts the same. It uses the
    ranks from a twentieth to half of K. This leaves out the leading directions, and those that are small because there
    are few rows.

    Args:
        eigenvalues: Eigenvalues of a covariance, largest first.

    Returns:
        The exponent, and the explained share of the weighted variance (R^2, 0..1). NaN if fewer than five eigenvalues
        in that range are above rounding. For equal eigenvalues both are 0.

    Examples:
        >>> power_law_exponent(torch.arange(1.0, 101.0) ** -2)[0]
        tensor(2.)

    References:
        Stringer et al. (2019), Nature 571, whose line is weighted so, over the ranks 11 to 500 of a few thousand.
        Agrawal et al. (2022), alpha-ReQ, NeurIPS: the same of representations.
    """
    size = eigenvalues.shape[-1]
    begin, end = max(1, round(BEGIN * size)), int(END * size)
    ranks = torch.arange(begin, end + 1, dtype=eigenvalues.dtype, device=eigenvalues.device)
    found = eigenvalues[..., begin - 1 : max(end, begin - 1)]
    ranks = ranks[: found.shape[-1]]
    there = found > ROUNDING * eigenvalues[..., :1]
    weights = torch.where(there, 1 / ranks, 0.0)
    x, y = ranks.log().expand_as(found), torch.where(there, found, 1.0).log()
    x, y = (z - ratio((weights * z).sum(-1), weights.sum(-1))[..., None] for z in (x, y))
    products, squares, others = ((weights * a * b).sum(-1) for a, b in ((x, y), (x, x), (y, y)))
    enough = (there.sum(-1) >= LEAST) & eigenvalues.isfinite().all(-1)
    exponent, quality = -ratio(products, squares), ratio(products.square(), squares * others)
    return torch.where(enough, exponent, torch.nan), torch.where(enough, quality.clamp(max=1), torch.nan)
