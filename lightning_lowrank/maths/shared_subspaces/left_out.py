"""The part of a left-out model that the subspace of the other models holds.

Shape letters:  N models   K components   H models that are left out, one at a time
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.shared_subspaces.components import centred, components


@dataclass(frozen=True)
class LeftOut:
    """Parts of the energy of a model that others hold, in the mean over the models that were left out.

    Attributes:
        mean: Of their mean alone: `1 - |x - m|^2 / |x|^2`; below 0 where the mean is a worse guess than nothing.
        basis: Of their `k` components alone, by k: `|V x|^2 / |x|^2`.
        mean_and_basis: Of both: `1 - |x - m - V'V(x - m)|^2 / |x|^2`.
        held: Which models were left out.
    """

    mean: float
    basis: list[float]
    mean_and_basis: list[float]
    held: tuple[int, ...]


def left_out(gram: Float[Tensor, "N N"], ks: Sequence[int], held: Sequence[int] | None = None) -> LeftOut:
    """Leave out one model at a time, and project it on what the others share.

    Out of sample. A random subspace of `k` dimensions holds `k / P` of any model. Models that are zero have no share:
    they are not left out. If all are zero, the shares are NaN.

    Cost: an eigendecomposition of N - 1 x N - 1 for each.

    Args:
        gram: Inner products of the models, not centred.
        held: Those that are left out, all unless given.
    """
    chosen = [i for i in (range(len(gram)) if held is None else held) if float(gram[i, i]) > 0]
    if not chosen:
        return LeftOut(math.nan, [math.nan] * len(ks), [math.nan] * len(ks), ())
    found = [float(value) for value in torch.stack([_one(gram, i, ks) for i in chosen]).mean(0)]
    return LeftOut(found[0], found[1 : 1 + len(ks)], found[1 + len(ks) :], tuple(chosen))


def _one(gram: Float[Tensor, "N N"], i: int, ks: Sequence[int]) -> Float[Tensor, " Q"]:
    others = torch.tensor([j for j in range(len(gram)) if j != i])
    inner, along, energy = gram[others][:, others], gram[others, i], gram[i, i]
    of_mean = along.mean() * 2 - inner.mean()
    weights = components(inner, max(ks)).weights
    alone, about = weights @ along, weights @ (along - inner.mean(1))
    sums = [torch.stack([part[:k].square().sum() for k in ks]) for part in (alone, about)]
    return torch.cat([of_mean[None], sums[0], of_mean + sums[1]]) / energy


def held_by(
    gram: Float[Tensor, "N N"], members: Sequence[int], others: Sequence[int], ks: Sequence[int]
) -> list[float]:
    """Part of the centred energy of other models in the `k` components of the members, by k; `k / P` by chance.

    Args:
        gram: Inner products of all of them.
    """
    own, theirs = torch.tensor(list(members)), torch.tensor(list(others))
    across = gram[own][:, theirs]
    projected = components(gram[own][:, own], max(ks)).weights @ (across - across.mean(1, keepdim=True))
    total = centred(gram[theirs][:, theirs]).trace()
    return [float(projected[:k].square().sum() / total) for k in ks]
