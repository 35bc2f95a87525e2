"""`subspace project`, `compress`, `reconstruct` and `merge`: models in an existing basis."""

import json as json_
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from rich.markup import escape
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_lowrank.analysis.overwriting import folder
from lightning_lowrank.analysis.showing import cell, print_json, save, show
from lightning_lowrank.analysis.subspaces.models import Models
from lightning_lowrank.analysis.subspaces.states import (
    Coefficients,
    Located,
    chosen_k,
    held,
    located,
    show_rows,
    stored,
    worth,
)
from lightning_lowrank.analysis.tasks import task_of
from lightning_lowrank.models.basis_files import Basis
from lightning_lowrank.models.unreadable_files import why_unreadable

COEFFICIENTS = "lightning-lowrank coefficients 1"


def subspace_project(
    basis: str, models: list[str], *, base: str | None = None, k: int | None = None, json: bool = False
) -> None:
    """Print how much of models a basis holds: its mean, its components, both, and random components.

    Args:
        basis: A file from subspace fit.
        models: Files or folders.
        base: The checkpoint that they were trained from. Default: that of the basis.
        k: Number of components. Default: all.
        json: Print all numbers, and the coefficients.

    Raises:
        ValueError: A file cannot be read, or a model has another architecture.
    """
    place = located(basis, base, updates=models)
    count = chosen_k(basis, place.basis.ks.values(), k)
    found = held(place.basis, place.models(models).updates, count)
    rows = dict(zip(models, found.shares, strict=True))
    if json:
        told = {
            path: {**row, "coefficients": {name: c[i].tolist() for name, c in found.coefficients.items()}}
            for i, (path, row) in enumerate(rows.items())
        }
        print_json({"k": count, "models": told})
    else:
        show_rows(f"part of the energy that {basis} holds, k={count}", rows)


def subspace_compress(
    basis: str,
    models: list[str],
    *,
    base: str | None = None,
    k: int | None = None,
    data: str | None = None,
    output: str,
    json: bool = False,
) -> None:
    """Write models as coefficients in a basis, and print how much smaller they are and what is lost.

    Args:
        basis: A file from subspace fit.
        models: Files or folders.
        base: The checkpoint that they were trained from. Default: that of the basis.
        k: Number of components. Default: all.
        data: `module:function` that returns (module, {name: batches}, measure(module, batch) -> {name: mean}). Each
            model is measured before and after, on the data with the name of its file, or on all data.
        output: Safetensors file for the coefficients.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read or written, the data function fails, or a model has another architecture.
    """
    place = located(basis, base, updates=models if data is None else ())
    file = place.output(output)
    count, found = chosen_k(basis, place.basis.ks.values(), k), place.models(models)
    task = None if data is None else task_of(data)
    kept = held(place.basis, found.updates, count)
    rows = {path: dict(row) for path, row in zip(models, kept.shares, strict=True)}
    if task is not None:
        for i, (path, row) in enumerate(rows.items()):
            row |= {f"{key}, whole": v for key, v in worth(task, place.original(found, i), path).items()}
            state = place.state({name: c[i] for name, c in kept.coefficients.items()})
            row |= {f"{key}, rebuilt": v for key, v in worth(task, state, path).items()}
    write_coefficients(file, place.basis, kept.coefficients, models)
    sizes = bytes_of(place.basis, found, file, count)
    if json:
        print_json({"k": count, "bytes": sizes, "models": rows})
        return
    show_rows(f"part of the energy that {basis} holds, k={count}", rows)
    show(
        f"{sizes['models']:,} bytes of {len(models)} models -> {sizes['coefficients']:,} of coefficients and "
        f"{sizes['basis']:,} of the basis: {sizes['ratio']:.2f} times less. Without the basis it is "
        f"{sizes['ratio_without_basis']:.0f} times less, which applies to later models. By parameter "
        f"counts, {sizes['ratio_by_counts']:.2f} times; at most {sizes['ratio_at_most']:.2f}, models over "
        "components and mean"
    )


def bytes_of(basis: Basis, models: Models, output: Path, k: int) -> dict[str, int | float]:
    """Size of models on disk and in the basis, in bytes and as ratios."""
    size = len(models.paths)
    whole, part, shared = sum(models.num_bytes), output.stat().st_size, basis.path.stat().st_size
    num_parameters = sum(shape.numel() for shape in basis.shapes.values())
    counts = {name: min(k, count) for name, count in basis.ks.items()}
    kept = sum((1 + counts[name]) * shape.numel() for name, shape in basis.shapes.items())
    return {
        "models": whole,
        "basis": shared,
        "coefficients": part,
        "ratio": whole / (shared + part),
        "ratio_without_basis": whole / part,
        "ratio_by_counts": size * num_parameters / (kept + size * sum(counts.values())),
        "ratio_at_most": size / (k + 1),
    }


def subspace_reconstruct(
    basis: str,
    *,
    coefficients: str | None = None,
    models: list[str] | None = None,
    base: str | None = None,
    k: int | None = None,
    output: str,
) -> None:
    """Write models from coefficients back as checkpoints.

    Args:
        basis: A file from subspace fit.
        coefficients: A file from subspace compress. Default: the models of the basis.
        models: Paths of the models to write, as in the file. Default: all.
        base: The checkpoint that they were trained from. Default: that of the basis.
        k: Number of components. Default: all.
        output: Folder for the checkpoints.

    Raises:
        ValueError: A file cannot be read or written, or it lacks a requested model.
    """
    place = located(basis, base)
    known, found = _coefficients(place.basis, coefficients)
    if wrong := [one for one in models or [] if one not in known]:
        raise ValueError(f"there is no model {wrong}; the models are {known[:10]}")
    count, there = chosen_k(coefficients or basis, (c.shape[1] for c in found.values()), k), folder(output)
    stems = [Path(path).stem for path in known]
    names = [stem if stems.count(stem) == 1 else f"{i}_{stem}" for i, stem in enumerate(stems)]
    files = {i: there / f"{names[i]}.safetensors" for i, path in enumerate(known) if models is None or path in models}
    place.refuse_loss(files.values())
    try:
        there.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{there} cannot be made a folder: {error}") from error
    for i, file in files.items():
        save(_state(place, found, i, count), file)
        show(f"{escape(str(file))}: {escape(known[i])} by {count} components")


def subspace_merge(
    basis: str,
    *,
    coefficients: str | None = None,
    of: Literal["mean", "coefficients"] = "mean",
    base: str | None = None,
    k: int | None = None,
    data: str | None = None,
    output: str,
    json: bool = False,
) -> None:
    """Merge models in a basis: by the mean of the basis, or by the mean of their coefficients.

    Args:
        basis: A file from subspace fit.
        coefficients: A file from subspace compress. Default: the models of the basis.
        of: Write only the mean, or the mean plus the mean coefficients. For the models of the basis both are the same
            for every k, since their coefficients have mean zero.
        base: The checkpoint that they were trained from. Default: that of the basis.
        k: Number of components. Default: all.
        data: `module:function` that returns (module, {name: batches}, measure); both merges are measured.
        output: Safetensors file to write.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read or written, or the data function fails.
    """
    place = located(basis, base)
    file = place.output(output)
    known, found = _coefficients(place.basis, coefficients)
    count = chosen_k(coefficients or basis, (c.shape[1] for c in found.values()), k)
    task = None if data is None else task_of(data)
    means = {name: c.mean(0, keepdim=True) for name, c in found.items()}
    nothing = {name: torch.zeros_like(c) for name, c in means.items()}
    moved = sum(float(c[:, :count].square().sum()) for c in means.values()) ** 0.5
    save(_state(place, means if of == "coefficients" else nothing, 0, count), file)
    numbers: dict[str, Any] = {"models": known, "of": of, "k": count, "norm_of_mean_coefficients": moved}
    if task is not None:
        for key, weights in (("mean", nothing), ("coefficients", means)):
            numbers[f"measured_{key}"] = worth(task, iter(_state(place, weights, 0, count).items()), "")
    if json:
        print_json(numbers)
        return
    same = "both merges are the same" if moved < 1e-6 else f"they differ by {moved:.3g}"
    show(f"{escape(output)}: {len(known)} models by the {of}; merge by mean and by coefficients: {same}")
    for key in ("mean", "coefficients"):
        for what, value in numbers.get(f"measured_{key}", {}).items():
            show(f"  {key}: {escape(what)} {cell(value)}")


def write_coefficients(file: Path, basis: Basis, coefficients: Coefficients, models: Sequence[str]) -> None:
    """Write coefficients of models in a basis, in single precision."""
    metadata = {"format": COEFFICIENTS, "models": json_.dumps(list(models)), "basis": _mark(basis)}
    try:
        save_file({name: c.float().contiguous() for name, c in coefficients.items()}, file, metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be written: {error}") from error


def _mark(basis: Basis) -> str:
    """A digest that tells a basis from others."""
    return sha256(basis.values().numpy().tobytes()).hexdigest()


def _coefficients(basis: Basis, path: str | None) -> tuple[list[str], Coefficients]:
    """Models by path, and their coefficients."""
    if path is None:
        return basis.models, stored(basis)
    try:
        file: Any = safe_open(Path(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {why_unreadable(Path(path), error)}") from error
    known = file.metadata() or {}
    if known.get("format") != COEFFICIENTS:
        raise ValueError(f"{path} has no coefficients; lightning-lowrank subspace compress writes them")
    if known["basis"] != _mark(basis):
        raise ValueError(
            f"{path} has coefficients in another basis than {basis.path}; give the basis they were written with"
        )
    return json_.loads(known["models"]), {name: file.get_tensor(name).double() for name in basis.shapes}


def _state(place: Located, coefficients: Coefficients, i: int, k: int) -> dict[str, Any]:
    own = {name: c[i] for name, c in coefficients.items()}
    return {name: tensor.contiguous() for name, tensor in place.state(own, k)}
