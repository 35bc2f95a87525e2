"""Models rebuilt from a basis, and what they are worth."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_lowrank.analysis.matrices import first
from lightning_lowrank.analysis.showing import cell, show
from lightning_lowrank.analysis.subspaces.models import Models, is_adapter, models_of, shapes_of
from lightning_lowrank.analysis.tasks import Task, means
from lightning_lowrank.models.basis_files import Basis
from lightning_lowrank.models.checkpoints import Checkpoint

# Of models by components, for each tensor by its name.
Coefficients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Located:
    """A basis, and what the updates in it are from.

    Attributes:
        basis: The file.
        base: The checkpoint that updates are added to, None where the basis is of weights.
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
        known = [self.basis.path, *map(Path, self.basis.models), *([] if self.base is None else [self.base.path])]
        for file in files:
            if file.is_file() and any(one.exists() and one.samefile(file) for one in known):
                raise ValueError(f"{file} is there, and {self.basis.path} is made of it: write to another place")

    def models(self, paths: Sequence[str]) -> Models:
        """Models on disk, as the basis takes them.

        Raises:
            ValueError: One has another architecture, or is not finite.
        """
        bases = [None if is_adapter(Path(path)) else self.base_path for path in paths]
        shapes = shapes_of(paths[0])
        wrong = {n: tuple(shapes.get(n, ())) for n, shape in self.basis.shapes.items() if shapes.get(n) != shape}
        if wrong:
            raise ValueError(
                f"{self.basis.path} does not fit models such as {paths[0]}, which lack these tensors or have them "
                f"in other shapes: {first(list(wrong.items()), 4)}"
            )
        found = models_of(paths, bases, [f"re:^{re.escape(name)}$" for name in self.basis.shapes])
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


def located(basis: str, base: str | None) -> Located:
    """A basis with its base.

    Args:
        base: Instead of the one that the basis names.

    Raises:
        ValueError: A file cannot be read, or the base has another architecture or is not finite.
    """
    found = Basis(basis)
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
    wrong = {n: tuple(start.shapes.get(n, ())) for n, shape in found.shapes.items() if start.shapes.get(n) != shape}
    if wrong:
        raise ValueError(f"{path} has another architecture than {basis}: {first(list(wrong.items()), 4)}")
    return Located(found, start)


def stored(basis: Basis) -> Coefficients:
    """Coefficients of the models that the basis is of."""
    return {name: basis.share(name).coefficients.double() for name in basis.shapes}


def projected(basis: Basis, models: Models) -> Coefficients:
    """Coefficients of other models."""
    found = {}
    for name in basis.shapes:
        share = basis.share(name)
        found[name] = torch.stack([share.project(models.tensor(i, name)) for i in range(len(models.paths))])
    return found


def chosen_k(basis: Basis, k: int | None) -> int:
    """How many components are used.

    Raises:
        ValueError: The basis has fewer.
    """
    most = max(basis.ks.values())
    if k is not None and not 1 <= k <= most:
        raise ValueError(f"k={k} must be from 1 to {most}, the number of components in {basis.path}")
    return most if k is None else k


def worth(task: Task, state: Iterator[tuple[str, Tensor]], model: str) -> dict[str, float]:
    """The measures of a model: on the data with its name, or on all.

    Raises:
        ValueError: The model is not of this network.
    """
    own, given = task.module.state_dict(), dict(state)
    missing = [name for name, _ in task.module.named_parameters() if name not in given]
    if missing:
        raise ValueError(f"the network has {first(missing)}, which {model} lacks")
    task.module.load_state_dict({name: given.get(name, value) for name, value in own.items()})
    stem = Path(model).stem
    return means(task.module, {stem: task.data[stem]} if stem in task.data else task.data, task.measure)


def show_rows(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """A table of models by what is said of each."""
    headings = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table(title=escape(title), title_justify="left", box=None)
    for heading in ("model", *headings):
        table.add_column(heading.replace("_", " "), justify="left" if heading == "model" else "right", overflow="fold")
    for path, row in rows.items():
        table.add_row(escape(path), *(cell(row.get(key, float("nan"))) for key in headings))
    show(table)
