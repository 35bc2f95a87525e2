"""Directions that models share along each axis of a tensor and along all at once, in and out of sample.

Shape letters:  N models   D size of one axis   K directions
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_lowrank.maths.shared_subspaces.components import gaussian_share

# An axis above this size is left out: its scatter has that many rows and columns.
LARGEST = 4096


@dataclass(frozen=True)
class Mode:
    """One axis of a tensor of several models, or all of them at once.

    Attributes:
        axis: Which one; None for all: `k` directions of each.
        size: Of the axis, or of the tensor.
        explained: Part of the centred energy of the models in the `k` strongest directions, by k.
        null: Of Gaussian models; of all axes at once, of some that were drawn.
        left_out: Part of the energy of a model that was left out in the directions of the others, by k.
        random: In random directions: `k / D`, or the product.
    """

    axis: int | None
    size: int
    explained: list[float]
    null: list[float]
    left_out: list[float]
    random: list[float]


def modes(
    model: Callable[[int], Num[Tensor, "..."]], num_models: int, ks: Sequence[int], held: Sequence[int]
) -> list[Mode]:
    """Every axis of a tensor that has at least two places, and at most 4096; then all of them at once, if several.

    One axis of one model has up to D directions, and N models share at most D of them. Unlike components over models,
    they are therefore not limited by the number of models.

    Cost: each model is read twice, with two products of D x P per axis, and models that are drawn cost as much. Each
    model that is left out costs an eigendecomposition of D x D per axis.

    Args:
        model: Gives the tensor of a model, in float64.
        num_models: N.
        held: Models that are left out, one at a time, unless they are zero. If all are, there are no shares.

    References:
        De Lathauwer, De Moor & Vandewalle (2000), SIAM J. Matrix Anal. Appl. 21(4), for the higher-order SVD.
    """
    shape = model(0).shape
    axes = [axis for axis, size in enumerate(shape) if 2 <= size <= LARGEST]
    found = _fitted(model, num_models, shape, axes)
    outside = []
    for i in held:
        x, rest = model(i), num_models - 1
        if not bool(x.any()):
            continue
        mean = (num_models * found.mean - x) / rest
        bases = {axis: _directions(found.sums[axis] - _scatter(x, axis) - rest * _scatter(mean, axis)) for axis in axes}
        outside.append(_energies(x, bases))
    chosen = [[axis] for axis in axes] + ([axes] if len(axes) > 1 else [])
    noise = _fitted(partial(_drawn, shape), num_models, shape, axes).inside if len(axes) > 1 else found.inside
    return [_mode(some, shape, num_models, ks, found.inside, outside, noise) for some in chosen]


@dataclass(frozen=True)
class _Fitted:
    """Of all models: their mean, sums of their scatters by axis, and squared centred entries along their directions."""

    mean: Float[Tensor, "*shape"]
    sums: Mapping[int, Float[Tensor, "_ _"]]
    inside: Float[Tensor, "*shape"]


def _fitted(model: Callable[[int], Tensor], num_models: int, shape: torch.Size, axes: Sequence[int]) -> _Fitted:
    mean = torch.zeros(shape, dtype=torch.float64)
    sums = {axis: torch.zeros(shape[axis], shape[axis], dtype=torch.float64) for axis in axes}
    for i in range(num_models):
        x = model(i)
        mean += x / num_models
        for axis in axes:
            sums[axis] += _scatter(x, axis)
    bases = {axis: _directions(sums[axis] - num_models * _scatter(mean, axis)) for axis in axes}
    inside = torch.zeros(shape, dtype=torch.float64)
    for i in range(num_models):
        inside += _energies(model(i) - mean, bases)
    return _Fitted(mean, sums, inside)


def _drawn(shape: torch.Size, i: int) -> Float[Tensor, "..."]:
    return torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def _mode(
    axes: Sequence[int],
    shape: torch.Size,
    num_models: int,
    ks: Sequence[int],
    inside: Tensor,
    outside: Sequence[Tensor],
    noise: Tensor,
) -> Mode:
    rows = [[_share(energies, axes, k) for k in ks] for energies in outside]
    size = prod(shape[axis] for axis in axes)
    return Mode(
        axes[0] if len(axes) == 1 else None,
        size,
        [_share(inside, axes, k) for k in ks],
        gaussian_share(size, (num_models - 1) * (shape.numel() // size), ks)
        if len(axes) == 1
        else [_share(noise, axes, k) for k in ks],
        [sum(column) / len(rows) for column in zip(*rows, strict=True)] or [math.nan] * len(ks),
        [prod(min(1.0, k / shape[axis]) for axis in axes) for k in ks],
    )


def _share(energies: Tensor, axes: Sequence[int], k: int) -> float:
    """Part of the energy in the first `k` places of some axes."""
    part = energies
    for axis in axes:
        part = part.narrow(axis, 0, min(k, part.shape[axis]))
    return float(part.sum() / energies.sum())


def _energies(x: Tensor, bases: Mapping[int, Float[Tensor, "D D"]]) -> Tensor:
    """Squared entries of a tensor in other bases of its axes."""
    for axis, basis in bases.items():
        x = (x.movedim(axis, -1) @ basis).movedim(-1, axis)
    return x.square()


def _directions(scatter: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Columns, strongest first."""
    vectors: Tensor = torch.linalg.eigh(scatter)[1]
    return vectors.flip(1)


def _scatter(x: Tensor, axis: int) -> Float[Tensor, "D D"]:
    unfolded = x.movedim(axis, 0).flatten(1)
    return unfolded @ unfolded.T
