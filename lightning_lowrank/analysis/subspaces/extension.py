"""`subspace extend`: add later models, and test the old ones again.

Shape letters:  N models of the basis   M new models   K components
"""

import json as json_
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.analysis.showing import print_json
from lightning_lowrank.analysis.subspaces.models import Models
from lightning_lowrank.analysis.subspaces.states import Located, located, show_rows, worth
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
    place = located(basis, base)
    place.refuse_loss([Path(output)])
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
    _write(Path(output), place, found, count)
    after = Located(Basis(output), place.base)
    from_files = all(Path(path).exists() for path in place.basis.models)
    old = place.models(place.basis.models) if from_files else None
    rows = {path: _held(place, after, old, i, path, data) for i, path in enumerate(place.basis.models)}
    size = len(rows)
    rows |= {path: _held(place, after, found, i, path, data, size + i) for i, path in enumerate(models)}
    if json:
        print_json({"k": count, "num_models": size + len(models), "from_files": from_files, "models": rows})
        return
    how = "" if from_files else "; the files of the old models are missing, so their coefficients are used"
    show_rows(f"part of the energy that {basis} and {output} hold{how}", rows)


def _held(
    before: Located, after: Located, models: Models | None, i: int, path: str, data: str | None, at: int | None = None
) -> dict[str, float]:
    """What both bases hold of a model, and what is measured of it.

    Args:
        models: Whose i-th it is; None for the i-th of the old basis, without its file.
        at: Its number in the new basis, i unless given.
    """
    lost, energy = {"before": 0.0, "after": 0.0}, 0.0
    states: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}}
    for name in before.basis.shapes:
        shares = {"before": before.basis.share(name), "after": after.basis.share(name)}
        x = models.tensor(i, name) if models is not None else shares["before"].rebuilt(shares["before"].coefficients[i])
        energy += float(x.square().sum())
        for when, share in shares.items():
            states[when][name] = share.project(x)
            lost[when] += float((x - share.rebuilt(states[when][name])).square().sum())
    row = {f"held {when}": 1 - value / energy if energy else float("nan") for when, value in lost.items()}
    if data is not None:
        task = task_of(data)
        for when, place in (("before", before), ("after", after)):
            row |= {f"{key}, {when}": value for key, value in worth(task, place.state(states[when]), path).items()}
    return row


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
