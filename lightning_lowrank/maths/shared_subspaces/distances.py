"""How far apart the subspaces of two groups of models are, and which models are alike.

Shape letters:  N models   K components   P parameters
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.shared_subspaces.components import components
from lightning_lowrank.maths.spectra.marchenko_pastur import quantiles


@dataclass(frozen=True)
class Apart:
    """Two subspaces of `k` dimensions.

    Attributes:
        overlap: Mean squared cosine of their principal angles, 1 where they are the same.
        overlap_chance: Of random subspaces, `k / P`.
        distance: Geodesic distance on the Grassmann manifold over its largest value, `sqrt(k) pi / 2`.
        distance_chance: Of random subspaces, by the singular values of a Gaussian matrix.

    All are NaN where the models of one group are equal.
    """

    overlap: float
    overlap_chance: float
    distance: float
    distance_chance: float


def apart(gram: Float[Tensor, "N N"], one: Sequence[int], other: Sequence[int], k: int, num_parameters: int) -> Apart:
    """The subspaces of the `k` strongest components of two groups of models.

    Args:
        gram: Inner products of all models.
        one: Models of the first group.
        other: Of the second.
        k: Below the number of models of either.
        num_parameters: P.

    References:
        Edelman, Arias & Smith (1998), SIAM J. Matrix Anal. Appl. 20(2), Section 4.3.
    """
    first, second = (torch.tensor(list(group)) for group in (one, other))
    a, b = (components(gram[group][:, group], k).weights for group in (first, second))
    k = min(len(a), len(b))
    if k == 0:
        return Apart(math.nan, math.nan, math.nan, math.nan)
    found = torch.linalg.svdvals(a[:k] @ gram[first][:, second] @ b[:k].T).clamp(max=1)
    chance = (quantiles(k, k) * math.sqrt(k / num_parameters)).clamp(max=1)
    return Apart(float(found.square().mean()), min(1.0, k / num_parameters), _distance(found), _distance(chance))


def _distance(cosines: Float[Tensor, " K"]) -> float:
    return float(cosines.acos().square().mean().sqrt()) / (math.pi / 2)


def linkage(distances: Float[Tensor, "N N"]) -> list[tuple[int, int, float, int]]:
    """Average linkage: which two clusters are joined, at which mean distance, and how many models are then in one.

    Clusters are numbered as scipy does: models first, then joins in their order.

    Cost: O(N^3).

    References:
        Sokal & Michener (1958), University of Kansas Science Bulletin 38, for the unweighted mean (UPGMA).
    """
    size = len(distances)
    near, labels, sizes, joins = distances.double().clone().fill_diagonal_(torch.inf), list(range(size)), [1] * size, []
    for new in range(size, 2 * size - 1):
        a, b = sorted(divmod(int(near.argmin()), size), key=labels.__getitem__)
        joins.append((labels[a], labels[b], float(near[a, b]), sizes[a] + sizes[b]))
        near[a] = near[:, a] = (sizes[a] * near[a] + sizes[b] * near[b]) / (sizes[a] + sizes[b])
        near[b] = near[:, b] = near[a, a] = torch.inf
        labels[a], sizes[a] = new, sizes[a] + sizes[b]
    return joins
