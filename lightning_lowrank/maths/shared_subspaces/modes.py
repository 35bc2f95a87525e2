"""Directions that models share along each axis of a tensor (higher-order SVD), in and out of sample.

Shape letters:  N models   D size of one axis   K directions
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_lowrank.maths.shared_subspaces.components import gaussian_share

# An axis above this size is left out: its scatter has that many rows and columns.
LARGEST = 4096


@dataclass(frozen=True)
class Mode:
    """One axis of a tensor of several models.

    Attributes:
        axis: Which one.
        size: Of the axis.
        explained: Part of the centred energy of the models in the `k` strongest directions of the axis, by k.
        null: Of Gaussian models.
        left_out: Part of the energy of a model that was left out in the directions of the others, by k.
        random: In random directions: `k / D`.
    """

    axis: int
    size: int
    explained: list[float]
    null: list[float]
    left_out: list[float]
    random: list[float]


def modes(
    model: Callable[[int], Num[Tensor, "..."]], num_models: int, ks: Sequence[int], held: Sequence[int]
) -> list[Mode]:
    """Every axis of a tensor that has at least two places, and at most 4096.

    One axis of one model has up to D directions, and N models share at most D of them. Unlike components over models,
    they are therefore not limited by the number of models.

    Cost: a product of D x P per model, and an eigendecomposition of D x D per axis and model that is left out.

    Args:
        model: Gives the tensor of a model, in float64.
        num_models: N.
        held: Models that are left out, one at a time.

    References:
        De Lathauwer, De Moor & Vandewalle (2000), SIAM J. Matrix Anal. Appl. 21(4), for the higher-order SVD.
    """
    shape = model(0).shape
    axes = [axis for axis, size in enumerate(shape) if 2 <= size <= LARGEST]
    mean = torch.zeros(shape, dtype=torch.float64)
    sums = {axis: torch.zeros(shape[axis], shape[axis], dtype=torch.float64) for axis in axes}
    for i in range(num_models):
        x = model(i)
        mean += x / num_models
        for axis in axes:
            sums[axis] += _scatter(x, axis)
    return [_mode(model, num_models, ks, held, axis, mean, sums[axis]) for axis in axes]


def _mode(
    model: Callable[[int], Tensor],
    num_models: int,
    ks: Sequence[int],
    held: Sequence[int],
    axis: int,
    mean: Tensor,
    total: Float[Tensor, "D D"],
) -> Mode:
    size, others = mean.shape[axis], prod(mean.shape) // mean.shape[axis]
    values = torch.linalg.eigvalsh(total - num_models * _scatter(mean, axis)).flip(0).clamp(min=0)
    inside = [float(values[:k].sum() / values.sum()) for k in ks]
    outside = []
    for i in held:
        x = model(i)
        own, rest = _scatter(x, axis), num_models - 1
        without = total - own - rest * _scatter((num_models * mean - x) / rest, axis)
        basis = torch.linalg.eigh(without)[1].flip(1)
        along = torch.einsum("dk,de,ek->k", basis, own, basis)
        outside.append([float(along[:k].sum() / own.trace()) for k in ks])
    means = [float(mean) for mean in torch.tensor(outside).mean(0)] if outside else []
    null = gaussian_share(size, (num_models - 1) * others, ks)
    return Mode(axis, size, inside, null, means, [min(1.0, k / size) for k in ks])


def _scatter(x: Tensor, axis: int) -> Float[Tensor, "D D"]:
    unfolded = x.movedim(axis, 0).flatten(1)
    return unfolded @ unfolded.T
