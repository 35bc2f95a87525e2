"""Merging of several fine-tuned models, and measures of their conflicts beforehand.

Shape letters:  M rows, N columns of a matrix   T models
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lightning_lowrank.models.checkpoints import Checkpoint, is_finite

# Directions whose overlap is measured.
TOP = 10

Method = Callable[[Tensor, float, float, torch.Generator], Tensor]


def _mean(changes: Tensor, scale: float, density: float, generator: torch.Generator) -> Tensor:
    return scale * changes.mean(0)


def _task_arithmetic(changes: Tensor, scale: float, density: float, generator: torch.Generator) -> Tensor:
    return scale * changes.sum(0)


def _ties(changes: Tensor, scale: float, density: float, generator: torch.Generator) -> Tensor:
    flat = changes.flatten(1).abs()
    kept = max(1, round(density * flat.shape[1]))
    least = flat.kthvalue(flat.shape[1] - kept + 1, dim=1).values.reshape(-1, *[1] * (changes.ndim - 1))
    trimmed = torch.where(changes.abs() >= least, changes, 0.0)
    sign = trimmed.sum(0).sign()
    agreeing = torch.where(trimmed.sign() == sign, trimmed, 0.0)
    count = (agreeing != 0).sum(0).clamp(min=1)
    merge: Tensor = scale * agreeing.sum(0) / count
    return merge


def _dare(changes: Tensor, scale: float, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(changes.shape, generator=generator, dtype=torch.float64) < density
    return scale * (changes * kept / density).sum(0)


def _tsv(changes: Tensor, scale: float, density: float, generator: torch.Generator) -> Tensor:
    if changes.ndim != 3:
        return scale * changes.mean(0)
    kept = max(1, min(changes.shape[1:]) // len(changes))
    left, values, right = torch.linalg.svd(changes, full_matrices=False)
    lefts = torch.cat(list(left[:, :, :kept]), 1)
    rights = torch.cat(list(right[:, :kept].mT), 1)
    strengths = scale * values[:, :kept].flatten()
    merge: Tensor = _nearest_orthonormal(lefts) * strengths @ _nearest_orthonormal(rights).T
    return merge


def _iso_c(changes: Tensor, scale: float, density: float, generator: torch.Generator) -> Tensor:
    if changes.ndim != 3:
        return scale * changes.mean(0)
    left, values, right = torch.linalg.svd(changes.sum(0), full_matrices=False)
    flat: Tensor = scale * values.mean() * left @ right
    return flat


def _nearest_orthonormal(columns: Tensor) -> Tensor:
    """Procrustes: orthonormal columns nearest to these."""
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


# Name -> (what it does to the changes of one tensor [T, ...], the scale unless given, its source).
METHODS: dict[str, tuple[Method, float]] = {
    "mean": (_mean, 1.0),
    "task-arithmetic": (_task_arithmetic, 0.3),
    "ties": (_ties, 1.0),
    "dare": (_dare, 0.3),
    "tsv": (_tsv, 1.0),
    "iso-c": (_iso_c, 1.0),
}


def merged(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    method: str,
    *,
    scale: float | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Merged weights, tensor by tensor: the base plus the changes of the models, combined by a method.

    - `mean`: their mean.
    - `task-arithmetic`: `scale` (0.3) times their sum (Ilharco et al. 2023, equation 1).
    - `ties`: keeps the share `density` (0.2) of largest magnitude of each tensor. Each entry is the mean of those that
      have the sign of the sum (Yadav et al. 2023, Algorithm 1, where the share is of all tensors together).
    - `dare`: keeps each entry with probability `density` (0.1) and divides it by this; then task arithmetic (Yu et al.
      2024, equation 3).
    - `tsv`: the top `min(M, N) / T` singular directions of each change, orthogonalised jointly (Gargiulo et al. 2025,
      Algorithm 1); the mean for all other tensors.
    - `iso-c`: their sum, with each singular value replaced by the mean of all (Marczak et al. 2025, equation 4); the
      mean for all other tensors.

    Convolutions count as matrices with outputs as rows and inputs times taps as columns.

    Cost: memory for one tensor of all models at a time; for `tsv` and `iso-c`, a singular value decomposition of each
    matrix.

    Args:
        base: The checkpoint that the models were fine-tuned from.
        models: At least two.
        method: One of the above.
        scale: Factor of the merged change.
        density: Share of entries that `ties` and `dare` keep, above 0 and at most 1.
        seed: Seed of the random choice of `dare`.

    Raises:
        ValueError: The method is unknown, an argument is out of range, or a model lacks a tensor of the base.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {list(METHODS)}")
    if density is not None and (method not in ("ties", "dare") or not 0 < density <= 1):
        raise ValueError(f"density={density} must be above 0 and at most 1; only ties and dare use it")
    if len(models) < 2:
        raise ValueError(f"{len(models)} models given; a merge needs at least two")
    refuse_strangers(base, models)
    do, usual = METHODS[method]
    factor = usual if scale is None else scale
    share = (0.2 if method == "ties" else 0.1) if density is None else density
    generator = torch.Generator().manual_seed(seed)
    for name in base.shapes:
        start = base.tensor(name)
        changes = changes_of(start, [model.tensor(name) for model in models])
        if not is_finite(changes):  # a mask of minus infinity
            yield name, start
            continue
        yield name, (start.double() + do(changes, factor, share, generator).reshape(start.shape)).to(start.dtype)


def changes_of(start: Tensor, ends: Sequence[Tensor]) -> Tensor:
    """`[T, M, N]` for matrices and convolutions, `[T, n]` for vectors, in float64."""
    changes = torch.stack([end.double() - start.double() for end in ends])
    return changes.flatten(2) if changes.ndim > 2 else changes.reshape(len(ends), -1)


def refuse_strangers(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """Raise an error if a model has another architecture.

    Raises:
        ValueError: The message has the tensors that differ, by name.
    """
    for model in models:
        wrong = [name for name, shape in base.shapes.items() if model.shapes.get(name) != shape]
        if wrong:
            there = {name: tuple(model.shapes[name]) if name in model.shapes else "missing" for name in wrong[:4]}
            raise ValueError(f"{model.path} has another architecture than {base.path}: {there}")


@dataclass(frozen=True)
class Conflict:
    """How the changes of two models relate in one matrix.

    Attributes:
        name: Name of the matrix.
        pair: Numbers of the models.
        cosine: Cosine of the changes as vectors; NaN if a model did not change. For random changes it is 0 with a
            standard deviation of `1 / sqrt(M N)`.
        overlap: Mean squared cosine of the principal angles between their top singular directions, averaged over left
            and right. NaN if the cosine is.
        chance: The overlap of random directions.
    """

    name: str
    pair: tuple[int, int]
    cosine: float
    overlap: float
    chance: float


def conflicts(
    base: Checkpoint, models: Sequence[Checkpoint], names: Mapping[str, object] | Sequence[str]
) -> Iterator[Conflict]:
    """Conflicts of every pair of models in every matrix.

    Cost: a singular value decomposition per model and matrix.

    Args:
        names: Names of the matrices.

    Raises:
        ValueError: A model lacks a tensor of the base.
    """
    refuse_strangers(base, models)
    for name in names:
        changes = changes_of(base.tensor(name), [model.tensor(name) for model in models])
        if not is_finite(changes):
            continue
        _, rows, columns = changes.shape
        k = min(TOP, rows, columns)
        left, _, right = torch.linalg.svd(changes, full_matrices=False)
        for i, j in combinations(range(len(models)), 2):
            norms = changes[i].norm() * changes[j].norm()
            moved = bool(norms > 0)
            shared = (left[i, :, :k].T @ left[j, :, :k]).square().sum() + (right[i, :k] @ right[j, :k].T).square().sum()
            yield Conflict(
                name,
                (i, j),
                float((changes[i] * changes[j]).sum() / norms) if moved else math.nan,
                float(shared / (2 * k)) if moved else math.nan,
                (k / rows + k / columns) / 2,
            )
