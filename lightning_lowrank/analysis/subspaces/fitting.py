"""A shared subspace of many models, whole and tensor by tensor, beside what noise of the shape has.

Shape letters:  N models   K components   P parameters
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.analysis.subspaces.models import Models
from lightning_lowrank.analysis.subspaces.writer import Writer
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.shared_subspaces.components import (
    Components,
    components,
    cosines,
    explained,
    gaussian_share,
)
from lightning_lowrank.maths.shared_subspaces.distances import apart, linkage
from lightning_lowrank.maths.shared_subspaces.left_out import held_by, left_out
from lightning_lowrank.maths.shared_subspaces.modes import modes as modes_of
from lightning_lowrank.models.basis_files import layout

USUAL = (1, 2, 4, 8, 16)
# Models that are left out one at a time, evenly chosen where there are more.
HELD = 64

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Fitted:
    """The subspace that several models share.

    Attributes:
        whole: Numbers of all tensors together, by name; each is by k where it depends on k.
        layers: The same by tensor.
        clusters: Joins of models by the cosine of their centred updates, as scipy numbers them.
        gram: Inner products of all updates, members before controls.
        parts: Of the tensors that are this process's own, what a basis has.
    """

    whole: Numbers
    layers: Mapping[str, Numbers]
    clusters: Sequence[tuple[int, int, float, int]]
    gram: Float[Tensor, "N N"] = field(repr=False)
    parts: Mapping[str, "Part"] = field(repr=False)


@dataclass(frozen=True)
class Part:
    """What a basis has of one tensor, without its directions.

    Attributes:
        components: As many as the largest k, or as there are.
        energies: Squared norms of the updates of the members.
    """

    components: Components
    energies: Float[Tensor, " N"]


def settled(k: str | None, num_models: int) -> tuple[list[int], list[int]]:
    """How many components are looked at, and which usual numbers are too many for so few models.

    Raises:
        ValueError: There are fewer than three models, or a number that was asked for is none or too large.
    """
    if num_models < 3:
        raise ValueError(
            f"{num_models} model(s) given. N models have N - 1 centred components, so one or two show nothing; give "
            "at least three"
        )
    most = num_models - 2
    if k is None:
        return [one for one in USUAL if one <= most], [one for one in USUAL if one > most]
    try:
        asked = sorted({int(one) for one in k.split(",")})
    except ValueError as error:
        raise ValueError(f"--k={k}: expected whole numbers separated by commas, such as 1,2,4") from error
    wrong = [one for one in asked if not 1 <= one <= most]
    if wrong:
        raise ValueError(
            f"--k={k}: {wrong} must be from 1 to {most}: {num_models} models have {num_models - 1} centred "
            "components, which explain everything for any models"
        )
    return asked, []


def fit(
    models: Models,
    ks: Sequence[int],
    num_members: int,
    team: Team,
    *,
    modes: bool = False,
) -> Fitted:
    """Components of the first `num_members` models, with all controls.

    Cost: every number of every model is read once, for a product of N x N. Memory holds one stretch of a tensor, N x N
    numbers, and 2 K x N per tensor. The work is shared out by tensor over the processes of the team.
    """
    names = list(models.shapes)
    owners = team.assign([float(models.shapes[name].numel()) for name in names])
    size = len(models.paths)
    total, own, parts = torch.zeros(size, size, dtype=torch.float64), {}, {}
    for name, owner in zip(names, owners, strict=True):
        if owner == team.rank:
            gram = models.gram(name)
            total += gram
            own[name] = of_gram(gram, models.shapes[name].numel(), ks, num_members)
            parts[name] = _part(gram[:num_members, :num_members], min(max(ks), models.shapes[name].numel()))
            if modes and len(models.shapes[name]) > 1:
                own[name]["modes"] = _modes(models, name, ks, num_members)
    team.all_reduce(total)
    found = {name: numbers for part in team.all_gather_object(own) for name, numbers in part.items()}
    num_parameters = sum(shape.numel() for shape in models.shapes.values())
    whole = of_gram(total, num_parameters, ks, num_members)
    joins = linkage(1 - cosines(total[:num_members, :num_members]))
    return Fitted(whole, {name: found[name] for name in names}, joins, total, parts)


def _part(gram: Float[Tensor, "N N"], k: int) -> Part:
    return Part(components(gram, k), gram.diagonal().clone())


def of_gram(gram: Float[Tensor, "N N"], num_parameters: int, ks: Sequence[int], num_members: int) -> Numbers:
    """All numbers of one matrix of inner products; those that depend on k are by k."""
    members, own = range(num_members), gram[:num_members, :num_members]
    numbers: Numbers = {
        "num_parameters": num_parameters,
        "explained": _by(ks, explained(own, ks)),
        "null": _by(ks, gaussian_share(num_members - 1, num_parameters, ks)),
    }
    found = left_out(own, ks, evenly(num_members))
    chance = [min(1.0, k / num_parameters) for k in ks]
    numbers["left_out"] = {
        "mean": _by(ks, [found.mean] * len(ks)),
        "mean_null": _by(ks, [-1 / (num_members - 1)] * len(ks)),
        "basis": _by(ks, found.basis),
        "mean_and_basis": _by(ks, found.mean_and_basis),
        "random": _by(ks, chance),
        "num_left_out": len(found.held),
    }
    numbers["halves"] = _apart(gram, members[::2], members[1::2], ks, num_parameters)
    if len(gram) > num_members:
        numbers["control"] = _of_control(gram, num_parameters, ks, num_members)
    return numbers


def _of_control(gram: Float[Tensor, "N N"], num_parameters: int, ks: Sequence[int], num_members: int) -> Numbers:
    """Models of another initialisation: their own components, and what those of the members hold of them."""
    members, others = range(num_members), range(num_members, len(gram))
    theirs = gram[num_members:, num_members:]
    own = [k for k in ks if k <= len(others) - 2]
    numbers: Numbers = {
        "explained": _by(own, explained(theirs, own)),
        "null": _by(own, gaussian_share(len(others) - 1, num_parameters, own)),
        "held_by_basis": _by(ks, held_by(gram, members, others, ks)),
        "random": _by(ks, [min(1.0, k / num_parameters) for k in ks]),
        "grassmann": _apart(gram, members, others, ks, num_parameters),
    }
    if own:
        found = left_out(theirs, own, evenly(len(others)))
        numbers["left_out"] = {
            "mean": _by(own, [found.mean] * len(own)),
            "mean_null": _by(own, [-1 / (len(others) - 1)] * len(own)),
            "basis": _by(own, found.basis),
            "mean_and_basis": _by(own, found.mean_and_basis),
        }
    return numbers


def _apart(
    gram: Float[Tensor, "N N"], one: Sequence[int], other: Sequence[int], ks: Sequence[int], num_parameters: int
) -> Numbers:
    """Distances of two groups of models, by the k that both allow."""
    known = [k for k in ks if k < min(len(one), len(other)) and k <= num_parameters]
    return {str(k): vars(apart(gram, one, other, k, num_parameters)) for k in known}


def _modes(models: Models, name: str, ks: Sequence[int], num_members: int) -> Numbers:
    held = evenly(num_members, 8)
    return {
        "all" if one.axis is None else str(one.axis): {
            "size": one.size,
            **{key: _by(ks, getattr(one, key)) for key in ("explained", "null", "left_out", "random")},
        }
        for one in modes_of(lambda i: models.tensor(i, name), num_members, ks, held)
    }


def write_basis(file: Path, models: Models, parts: Mapping[str, Part], base: str | None, team: Team) -> None:
    """Write the mean of each tensor and its components, of a fit that this team made.

    Cost: every number of every model is read once more.

    Raises:
        ValueError: The file cannot be written.
    """
    sizes = {name: part.components.coefficients.shape for name, part in parts.items()}
    sizes = {name: shape for own in team.all_gather_object(sizes) for name, shape in own.items()}
    counts, size = {name: k for name, (_, k) in sizes.items()}, max(n for n, _ in sizes.values())
    keys = layout(models.shapes, counts, size)
    words = {
        "models": list(models.paths[:size]),
        "base": base,
        "is_of_updates": models.are_updates,
        "tensors": list(models.shapes),
    }
    metadata = {key: json.dumps(value) for key, value in words.items()}
    writer = Writer(file, keys, metadata) if team.rank == 0 else None
    team.all_gather_object(None)  # the file is there
    writer = writer or Writer(file, keys, metadata, begin=False)
    for name, part in parts.items():
        writer.write(f"values/{name}", part.components.values)
        writer.write(f"coefficients/{name}", part.components.coefficients)
        writer.write(f"energies/{name}", part.energies)
        _write_sums(writer, models, name, part.components.weights)
    writer.close()
    team.all_gather_object(None)  # all have written


def _write_sums(writer: Writer, models: Models, name: str, weights: Float[Tensor, "K N"]) -> None:
    """The mean and the components of one tensor, stretch by stretch."""
    k, size = weights.shape
    mean = torch.full((1, size), 1 / size, dtype=torch.float64)
    at, length = 0, models.shapes[name].numel()
    for sums in models.sums(name, torch.cat([mean, weights])):
        writer.write(f"mean/{name}", sums[0], at)
        for i in range(k):
            writer.write(f"components/{name}", sums[1 + i], i * length + at)
        at += sums.shape[1]


def evenly(num_models: int, most: int = HELD) -> list[int]:
    """Which models are left out: all, or that many, evenly chosen."""
    if num_models <= most:
        return list(range(num_models))
    return [i * num_models // most for i in range(most)]


def _by(ks: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    return {str(k): value for k, value in zip(ks, values, strict=True)}
