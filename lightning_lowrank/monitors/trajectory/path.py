"""How many directions a path uses, from the inner products of its points, beside a random walk's.

Shape letters:  N points of the path
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import eigenvalues, full_precision

# Components whose explained variance is given.
COMPONENTS = (1, 2, 4)


def centred(gram: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    """Inner products of the points less their mean."""
    rows = gram - gram.mean(0)
    return rows - rows.mean(1, keepdim=True)


def numbers(gram: Float[Tensor, "N N"]) -> dict[str, Float[Tensor, ""]]:
    """Numbers of directions that a path with these inner products uses; NaN if it does not move or has too few points.

    Of N points the first N - 1 components have everything: an explained variance takes two points more than components.

    Examples:
        >>> line = torch.arange(4.0, dtype=torch.float64)
        >>> numbers(torch.outer(line, line))["explained_1"]
        tensor(1., dtype=torch.float64)
    """
    with full_precision(gram.device):
        inner = centred(gram)
        energies, total = eigenvalues(inner).flip(0).clamp(min=0), inner.trace()
        moves, ends = steps(gram).clamp(min=0).sqrt(), [0, -1]
        found = {f"explained_{k}": _ratio(energies[:k].sum(), total) for k in COMPONENTS if len(gram) >= k + 2}
        if len(gram) >= 3:
            found["participation_ratio"] = _ratio(energies.sum().square(), energies.square().sum())
            found["straightness"] = _ratio(steps(gram[ends][:, ends]).clamp(min=0).sqrt().sum(), moves.sum())
    return found


def of_a_random_walk(times: Sequence[int]) -> dict[str, Float[Tensor, ""]]:
    """The same for a random walk in many dimensions at these times; its points have inner products `min(t, t')`.

    Of many points at equal distances, component k has `6 / (pi k)^2` of the variance.

    Examples:
        >>> round(float(of_a_random_walk(range(100))["explained_1"]), 2)
        0.61
    """
    clock = torch.tensor(list(times), dtype=torch.float64)
    return numbers(torch.minimum(clock[:, None], clock[None, :]) - clock[0])


def steps(gram: Float[Tensor, "N N"]) -> Float[Tensor, " N-1"]:
    """Squared distances of each point to the next."""
    own = gram.diagonal()
    return own[1:] + own[:-1] - 2 * gram.diagonal(1)


def _ratio(part: Tensor, whole: Tensor) -> Float[Tensor, ""]:
    return torch.where(whole > 0, part / whole, torch.nan)
