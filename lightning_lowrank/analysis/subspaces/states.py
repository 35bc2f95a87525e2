"""Models rebuilt from a basis, and what they are worth."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_lowrank.analysis.matrices import first
from lightning_lowrank.analysis.overwriting import is_read, tensors_file
from lightning_lowrank.analysis.showing import cell, show
from lightning_lowrank.analysis.subspaces.models import Models, differing, is_adapter, models_of, shapes_of
from lightning_lowrank.analysis.tasks import Task, means
from lightning_lowrank.models.basis_files import Basis
from lightning_lowrank.models.checkpoints import Checkpoint

# Of models by components, for each tensor by its name.
Coefficients = Mapping[str, Tensor]
PARTS = ("energy", "mean", "basis", "mean_and_basis")


@dataclass(frozen=True)
class Located:
    """A basis, and what the updates in it are from.

    Attributes:
        basis: The file.
        base: The checkpoint that updates are added to, None where the basis is of weights or no base is needed.
    """

    basis: Basis
    base: Checkpoint | None

    @property
    def base_path(self) -> str | None:
        """Path of the base."""
        return None if self.base is None else str(self.base.path)

    def refuse_loss(self, files: Iterable[Path]) -> None:
        """Refuse to write over the basis, its models or its base.

        Raises:
            ValueError: One of the files is one of them.
        """
        known = [self.basis.path, *map(Path, self.basis.models)]
        known += [Path(base) for base in (self.base_path, self.basis.base) if base is not None]
        for file in files:
            if is_read(file, known):
                raise ValueError(f"{file} is there, and {self.basis.path} is made of it: write to another place")

    def output(self, file: str) -> Path:
        """A file that is to be written.

        Raises:
            ValueError: It is one of those that are read, or its name or its folder is wrong.
        """
        self.refuse_loss([Path(file)])
        return tensors_file(file)

    def models(self, paths: Sequence[str]) -> Models:
        """Models on disk, as the basis takes them.

        Raises:
            ValueError: One has another architecture, or is not finite.
        """
        bases = [None if is_adapter(Path(path)) else self.base_path for path in paths]
        if wrong := differing(shapes_of(paths[0]), self.basis.shapes):
            raise ValueError(
                f"{self.basis.path} does not fit models such as {paths[0]}, which lack these tensors or have them "
                f"in other shapes: {first(wrong, 4)}"
            )
        found = models_of(paths, bases, [f"re:^({'|'.join(map(re.escape, self.basis.shapes))})$"])
        found.refuse_infinite()
        return found

    def state(self, coefficients: Coefficients, k: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the model that has these coefficients; those that are not in the basis are the base's."""
        for name in self.basis.shapes if self.base is None else self.base.shapes:
            if name not in self.basis.shapes:
                assert self.base is not None
                yield name, self.base.tensor(name)
                continue
            update = self.basis.share(name).rebuilt(coefficients[name][:k])
            start = None if self.base is None else self.base.tensor(name)
            yield name, update.float() if start is None else (start.double() + update).to(start.dtype)

    def original(self, models: Models, i: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a model as it is on disk, those that it lacks from the base."""
        known = dict(self.base.shapes) if self.base is not None else dict(models.shapes)
        for name in known:
            start = None if self.base is None else self.base.tensor(name)
            if name not in models.shapes:
                assert start is not None
                yield name, start
                continue
            update = models.tensor(i, name)
            yield name, update.float() if start is None else (start.double() + update).to(start.dtype)


def located(basis: str, base: str | None, *, updates: Sequence[str] = ()) -> Located:
    """A basis with its base.

    Args:
        base: Instead of the one that the basis names.
        updates: Models that are all there is to read. If they and those of the basis are adapters, no base is needed.

    Raises:
        ValueError: A file cannot be read, or the base has another architecture or is not finite.
    """
    found = Basis(basis)
    known = [Path(path) for path in (*updates, *found.models) if Path(path).exists()]
    if base is None and updates and all(map(is_adapter, known)):
        return Located(found, None)
    if not found.is_of_updates:
        if base is not None:
            raise ValueError(f"{basis} contains weights, not updates; leave out --base")
        return Located(found, None)
    path = base or found.base
    if path is None:
        raise ValueError(f"{basis} contains updates; give their base with --base")
    if not Path(path).exists():
        raise ValueError(f"{basis} contains updates from {path}, which does not exist; give the base with --base")
    start = Checkpoint(path)
    start.refuse_infinite()
    if wrong := differing(start.shapes, found.shapes):
        raise ValueError(f"{path} has another architecture than {basis}: {first(wrong, 4)}")
    return Located(found, start)


def stored(basis: Basis) -> Coefficients:
    """Coefficients of the models that the basis is of."""
    return {name: basis.share(name).coefficients.double() for name in basis.shapes}


@dataclass(frozen=True)
class Held:
    """What a basis holds of several models.

    Attributes:
        shares: Of each model parts of its energy, all tensors together: in the mean, in the components, in both, and in
            random components.
        coefficients: Of the models about the mean.
    """

    shares: Sequence[Mapping[str, float]]
    coefficients: Coefficients


def held(basis: Basis, updates: Callable[[str], Iterable[Tensor]], k: int) -> Held:
    """What `k` components hold of models.

    Cost: each tensor of the basis and of each model is read once.

    Args:
        updates: Gives the updates of one tensor, model by model.
    """
    sums: list[dict[str, float]] = []
    coefficients = {}
    for name in basis.shapes:
        share, rows = basis.share(name), []
        directions, mean = share.directions[:k], share.mean.double().flatten()
        for i, update in enumerate(updates(name)):
            x = update.flatten()
            away = x - mean
            rows.append(directions @ away)
            of_mean, of_both = float(x @ x - away @ away), float(rows[-1].square().sum())
            parts = (float(x @ x), of_mean, float((directions @ x).square().sum()), of_mean + of_both)
            sums += [dict.fromkeys(PARTS, 0.0)] if i == len(sums) else []
            sums[i] = {key: sums[i][key] + part for key, part in zip(PARTS, parts, strict=True)}
        coefficients[name] = torch.stack(rows)
    size = sum(shape.numel() for shape in basis.shapes.values())
    random = sum(min(k, shape.numel()) for shape in basis.shapes.values()) / size
    return Held([_shares(one) | {"random": random} for one in sums], coefficients)


def _shares(sums: Mapping[str, float]) -> dict[str, float]:
    energy = sums["energy"]
    return {key: sums[key] / energy if energy else float("nan") for key in PARTS if key != "energy"}


def chosen_k(where: str | Path, ks: Iterable[int], k: int | None) -> int:
    """How many components are used, all unless given.

    Args:
        where: The file that has them.
        ks: How many it has of each tensor.

    Raises:
        ValueError: There are fewer.
    """
    most = max(ks)
    if k is not None and not 1 <= k <= most:
        raise ValueError(f"k={k} must be from 1 to {most}, the number of components in {where}")
    return most if k is None else k


def worth(task: Task, state: Iterator[tuple[str, Tensor]], model: str) -> dict[str, float]:
    """The measures of a model: on the data with its name, or on all, which are then part of the names of measures.

    Raises:
        ValueError: The model is not of this network.
    """
    own, given = task.module.state_dict(), dict(state)
    missing = [name for name, _ in task.module.named_parameters() if name not in given]
    if missing:
        raise ValueError(f"the network has {first(missing)}, which {model} lacks")
    task.module.load_state_dict({name: given.get(name, value) for name, value in own.items()})
    stem = Path(model).stem
    if stem not in task.data:
        return means(task.module, task.data, task.measure)
    found = means(task.module, {stem: task.data[stem]}, task.measure)
    return {key.removeprefix(f"{stem}/"): value for key, value in found.items()}


def show_rows(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """A table of models by what is said of each."""
    headings = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table(title=escape(title), title_justify="left", box=None)
    for heading in ("model", *headings):
        table.add_column(heading.replace("_", " "), justify="left" if heading == "model" else "right", overflow="fold")
    for path, row in rows.items():
        table.add_row(escape(path), *(cell(row.get(key, float("nan"))) for key in headings))
    show(table)
