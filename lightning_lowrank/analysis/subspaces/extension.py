"""`subspace extend`: add later models, and test the old ones again.

Shape letters:  N models of the basis   M new models   K components
"""

import json as json_
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.analysis.showing import print_json
from lightning_lowrank.analysis.subspaces.models import Models
from lightning_lowrank.analysis.subspaces.states import Located, held, located, show_rows, worth
from lightning_lowrank.analysis.subspaces.writer import Writer
from lightning_lowrank.analysis.tasks import task_of
from lightning_lowrank.maths.shared_subspaces.extension import Subspace, extended
from lightning_lowrank.models.basis_files import Basis, Share, layout


def subspace_extend(
    basis: str,
    models: list[str],
    *,
    base: str | None = None,
    k: int | None = None,
    data: str | None = None,
    output: str,
    json: bool = False,
) -> None:
    """Write a basis that also holds later models, and print what it holds of the old ones before and after.

    Args:
        basis: A file from subspace fit.
        models: Files or folders of the new models, in the order in which they came.
        base: The checkpoint that they were trained from. Default: that of the basis.
        k: Number of components of the new basis. Default: that of the old one.
        data: `module:function` that returns (module, {name: batches}, measure). Each model is measured as rebuilt from
            the old and from the new basis. It is measured on the data with the name of its file, or on all data.
        output: Safetensors file to write.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read or written, a model is already in the basis or has another architecture, or k
            is out of range.
    """
    place = located(basis, base, updates=models if data is None else ())
    file = place.output(output)
    there = {Path(path).resolve() for path in place.basis.models}
    if known := [path for path in models if Path(path).resolve() in there]:
        raise ValueError(f"{basis} already contains {known}")
    found = place.models(models)
    most = max(place.basis.ks.values())
    count = most if k is None else k
    if not 1 <= count <= most + len(models):
        raise ValueError(
            f"k={k} must be from 1 to {most + len(models)}: {most} components of {basis}, and one per new model"
        )
    task = None if data is None else task_of(data)
    _write(file, place, found, count)
    after = Located(Basis(file), place.base)
    from_files = all(Path(path).exists() for path in place.basis.models)
    old = place.models(place.basis.models).updates if from_files else partial(_remembered, place.basis)
    rows: dict[str, dict[str, float]] = {}
    for paths, updates in ((place.basis.models, old), (models, found.updates)):
        for when, one in (("before", place), ("after", after)):
            kept = held(one.basis, updates, max(one.basis.ks.values()))
            for i, (path, shares) in enumerate(zip(paths, kept.shares, strict=True)):
                row = rows.setdefault(path, {})
                row[f"held {when}"] = shares["mean_and_basis"]
                if task is not None:
                    state = one.state({name: c[i] for name, c in kept.coefficients.items()})
                    row |= {f"{key}, {when}": value for key, value in worth(task, state, path).items()}
    if json:
        print_json({"k": count, "num_models": len(rows), "from_files": from_files, "models": rows})
        return
    how = "" if from_files else "; the files of the old models are missing, so their coefficients are used"
    show_rows(f"part of the energy that {basis} and {output} hold{how}", rows)


def _remembered(basis: Basis, name: str) -> Iterator[Tensor]:
    """Updates of one tensor of the models of a basis, as their coefficients give them."""
    share = basis.share(name)
    return (share.rebuilt(coefficients) for coefficients in share.coefficients)


def _write(file: Path, place: Located, models: Models, k: int) -> None:
    """The extended basis, tensor by tensor."""
    old, size = place.basis, len(models.paths)
    counts = {name: min(k, old.ks[name] + size, shape.numel()) for name, shape in old.shapes.items()}
    names = [*old.models, *models.paths]
    words = {"models": names, "base": place.base_path or old.base, "is_of_updates": old.is_of_updates}
    words["tensors"] = list(old.shapes)
    metadata = {key: json_.dumps(value) for key, value in words.items()}
    writer = Writer(file, layout(old.shapes, counts, len(names)), metadata)
    for name, shape in old.shapes.items():
        updates = [models.tensor(i, name).flatten() for i in range(size)]
        share = old.share(name)
        found = _extended(share, updates, counts[name])
        again = [found.project(share.rebuilt(c).flatten()) for c in share.coefficients]
        energies = torch.stack([*share.energies, *(x @ x for x in updates)])
        writer.write(f"mean/{name}", found.mean)
        writer.write(f"components/{name}", found.basis)
        writer.write(f"values/{name}", found.values)
        writer.write(f"coefficients/{name}", torch.stack([*again, *(found.project(x) for x in updates)]))
        writer.write(f"energies/{name}", energies)
        assert found.basis.shape == (counts[name], shape.numel())
    writer.close()


def _extended(share: Share, updates: Sequence[Float[Tensor, " P"]], k: int) -> Subspace:
    """With zeros for components that there are none of."""
    found = Subspace(len(share.energies), share.mean.double().flatten(), share.directions, share.values.double())
    for update in updates:
        found = extended(found, update, k if update is updates[-1] else len(found.values) + 1)
    missing = k - len(found.values)
    padded = torch.nn.functional.pad
    return Subspace(
        found.num_models, found.mean, padded(found.basis, (0, 0, 0, missing)), padded(found.values, (0, missing))
    )
