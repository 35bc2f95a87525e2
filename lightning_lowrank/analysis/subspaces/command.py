"""`subspace fit`: the subspace that many models share."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.tree import Tree
from torch import distributed as dist

from lightning_lowrank.analysis.drawing import draw, numbers
from lightning_lowrank.analysis.matrices import first
from lightning_lowrank.analysis.overwriting import tensors_file
from lightning_lowrank.analysis.showing import cell, print_json, show
from lightning_lowrank.analysis.subspaces.fitting import Fitted, fit, settled, write_basis
from lightning_lowrank.analysis.subspaces.models import Adapters, Models, models_of
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.shared_subspaces.components import cosines

# Models below which what is shared hangs on single ones.
FEW = 10
# Models above which their tree is not printed.
LARGE = 64


def subspace_fit(
    checkpoints: list[str],
    *,
    base: str | None = None,
    control: list[str] | None = None,
    control_base: str | None = None,
    k: str | None = None,
    match: list[str] | None = None,
    exclude: list[str] | None = None,
    modes: bool = False,
    output: str | None = None,
    page: str | None = None,
    json: bool = False,
) -> None:
    """Print which subspace many models share, compared with noise, and how much of a left-out model it contains.

    Args:
        checkpoints: Files or folders of models of one architecture, or LoRA adapters; at least three.
        base: The checkpoint that the models were trained from; its weights are subtracted. Default: the weights
            themselves are used.
        control: Models with another initialisation, for comparison.
        control_base: The checkpoint that these were trained from.
        k: Numbers of components, such as 1,2,4. Default: those of 1,2,4,8,16 that the number of models allows.
        match: Only tensors whose name matches one of these globs or `re:REGEX`.
        exclude: Leave these out.
        modes: Also print what models share along each axis of each tensor, and along all axes (higher-order SVD).
        output: Safetensors file for the basis: the mean and the components of each tensor, as many as the largest k.
        page: HTML file with charts of all numbers; k takes the place of steps.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read or written, the models have different architectures, there are too few models,
            or k is too large for them.
    """
    file = None if output is None else tensors_file(output)
    ks, dropped = settled(k, len(checkpoints))
    controls = control or []
    if control is not None and len(controls) < 3:
        raise ValueError(f"{len(controls)} model(s) given as --control; components need at least three")
    if control_base is not None and not controls:
        raise ValueError("--control-base needs --control")
    bases = [base] * len(checkpoints) + [control_base] * len(controls)
    models = models_of([*checkpoints, *controls], bases, match, exclude)
    with processes() as team:
        found = fit(models, ks, len(checkpoints), team, modes=modes)
        if file is not None:
            if isnan(found.whole["explained"][str(ks[0])]):
                raise ValueError("the models are equal: they have no components, and there is no basis to write")
            write_basis(file, models, found.parts, base or next(iter(adapted(models, len(checkpoints))), None), team)
        if team.rank:
            return
        warnings = cautions(models, len(checkpoints), ks, dropped, bool(controls))
        warnings += strangers(models, found, len(checkpoints), base, control_base)
        if page is not None:
            draw(page, {"fit": {k: numbers("subspace", _shares(found, str(k))) for k in ks}})
        if json:
            print_json(_json(found, checkpoints, ks, dropped, warnings))
        else:
            _tell(found, checkpoints, ks, warnings)
            if file is not None:
                show(f"{escape(str(file))}: a basis of {ks[-1]} components for each tensor")


@contextmanager
def processes() -> Iterator[Team]:
    """Those that torchrun has started, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield Team(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Team()
        return
    dist.init_process_group("gloo")
    try:
        yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def cautions(
    models: Models, num_members: int, ks: Sequence[int], dropped: Sequence[int], is_controlled: bool
) -> list[str]:
    """Warnings to read before any number."""
    found = []
    if dropped:
        found.append(
            f"k={','.join(map(str, dropped))} left out: {num_members} models have {num_members - 1} components"
        )
    if num_members < FEW:
        found.append(
            f"{num_members} models are few. Even for noise, {ks[-1]} component(s) explain "
            f"{ks[-1] / (num_members - 1):.0%} of the energy. Read the left-out columns, and use --modes"
        )
    if models.is_related(num_members):
        found.append(
            (
                "the models share an initialisation. What they have in common may come from it, and says nothing about "
                "models from other initialisations"
            )
            + ("" if is_controlled else "; give such models as --control")
        )
    if isinstance(models, Adapters) and models.left_out:
        found.append(f"trained in full and ignored: {models.left_out[:5]}")
    return found


def strangers(models: Models, found: Fitted, num_members: int, base: str | None, control_base: str | None) -> list[str]:
    """Warnings about models that are not of the same kind as the others."""
    warnings, size = [], len(models.paths)
    if zero := [path for path, energy in zip(models.paths, found.gram.diagonal(), strict=True) if not float(energy)]:
        warnings.append(f"{first(zero)} are equal to the base, or zero: they count as models, but are not left out")
    if size > num_members and (base is None) != (control_base is None):
        kinds = ("the weights", "the updates") if base is None else ("the updates", "the weights")
        lacking = "--base" if base is None else "--control-base"
        warnings.append(f"{kinds[0]} of models are compared with {kinds[1]} of controls; give {lacking}, or none")
    if len(adapted(models, num_members)) > 1:
        warnings.append(f"the adapters are for different bases, {first(adapted(models, num_members))}")
    return warnings


def adapted(models: Models, num_members: int) -> list[str]:
    """Bases that adapters name, controls aside."""
    bases = models.bases[:num_members] if isinstance(models, Adapters) else []
    return list(dict.fromkeys(base for base in bases if base is not None))


def _json(
    found: Fitted, checkpoints: Sequence[str], ks: Sequence[int], dropped: Sequence[int], warnings: Sequence[str]
) -> Any:
    size = len(checkpoints)
    return {
        "models": list(checkpoints),
        "num_models": size,
        "k": list(ks),
        "dropped_k": list(dropped),
        "warnings": list(warnings),
        "whole": found.whole,
        "layers": found.layers,
        "cosines": cosines(found.gram[:size, :size]).tolist(),
        "clusters": [list(join) for join in found.clusters],
    }


def _tell(found: Fitted, checkpoints: Sequence[str], ks: Sequence[int], warnings: Sequence[str]) -> None:
    for warning in warnings:
        show(f"[bold]note[/]: {escape(warning)}")
    show(_by_k(found.whole, ks, len(checkpoints)))
    show(_by_layer(found.layers, ks[-1]))
    if any("modes" in numbers for numbers in found.layers.values()):
        show(_by_mode(found.layers, ks))
    if len(checkpoints) > LARGE:
        show(f"--json has the clusters of the models: a tree of {len(checkpoints)} is too large to read")
    else:
        show(_dendrogram(found, [Path(path).name for path in checkpoints]))


ROWS = {
    "explained, in sample": ("explained",),
    "  of Gaussian models": ("null",),
    "left out: mean of the others": ("left_out", "mean"),
    "  of independent models": ("left_out", "mean_null"),
    "left out: basis of the others": ("left_out", "basis"),
    "  a random basis": ("left_out", "random"),
    "left out: mean and basis": ("left_out", "mean_and_basis"),
    "control: explained, in sample": ("control", "explained"),
    "  held by the basis": ("control", "held_by_basis"),
    "  by a random basis": ("control", "random"),
}


def _shares(found: Fitted, k: str) -> dict[str, dict[str, float]]:
    """Of the whole and of each tensor: all that depends on k alone."""
    rows = {}
    for name, row in {"whole": found.whole, **found.layers}.items():
        left = {f"left_out_{key}": values[k] for key, values in row["left_out"].items() if isinstance(values, dict)}
        rows[name] = {"explained": row["explained"][k], "null": row["null"][k], **left}
    return rows


def _by_k(whole: Mapping[str, Any], ks: Sequence[int], num_models: int) -> Table:
    title = f"{num_models} models, {whole['num_parameters']:,} numbers each, whole"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("part of the energy")
    for k in ks:
        table.add_column(f"k={k}", justify="right")
    for heading, path in ROWS.items():
        row: Any = whole
        for key in path:
            row = row.get(key, {})
        if row:
            table.add_row(heading, *(cell(row.get(str(k), float("nan"))) for k in ks))
    for heading, apart in (("halves", whole["halves"]), ("control", whole.get("control", {}).get("grassmann", {}))):
        if apart:
            told = (apart.get(str(k)) for k in ks)
            row = ["-" if one is None else f"{one['distance']:.3f} ({one['distance_chance']:.3f})" for one in told]
            table.add_row(f"Grassmann distance of {heading} (chance)", *row)
    return table


def _by_layer(layers: Mapping[str, Any], k: int) -> Table:
    table = Table(title=f"each tensor, k={k}", title_justify="left", box=None)
    for heading in ("tensor", "numbers", "explained", "Gaussian", "mean", "basis", "mean and basis", "random"):
        table.add_column(heading, justify="left" if heading == "tensor" else "right", overflow="fold")
    for name, row in layers.items():
        left = row["left_out"]
        values = [row["explained"], row["null"], *(left[key] for key in ("mean", "basis", "mean_and_basis"))]
        cells = [cell(one[str(k)]) for one in (*values, left["random"])]
        table.add_row(escape(name), str(row["num_parameters"]), *cells)
    return table


def _by_mode(layers: Mapping[str, Any], ks: Sequence[int]) -> Table:
    table = Table(title="each axis: explained / Gaussian, left out / random", title_justify="left", box=None)
    for heading in ("tensor", "axis", "size", *(f"k={k}" for k in ks)):
        table.add_column(heading, justify="left" if heading == "tensor" else "right", overflow="fold")
    for name, row in layers.items():
        for axis, one in row.get("modes", {}).items():
            keys = ("explained", "null", "left_out", "random")
            cells = ["{:.2f}/{:.2f} {:.2f}/{:.2f}".format(*(one[key][str(k)] for key in keys)) for k in ks]
            table.add_row(escape(name), axis, str(one["size"]), *cells)
    return table


def _dendrogram(found: Fitted, names: Sequence[str]) -> Tree:
    """Clusters of models: a branch for each join, with its distance."""
    size = len(names)
    joined = {size + i: join for i, join in enumerate(found.clusters)}

    def grow(parent: Tree, node: int) -> Tree:
        if node < size:
            return parent.add(escape(names[node]))
        a, b, height, _ = joined[node]
        branch = parent.add(f"{height:.3f}")
        grow(branch, a)
        grow(branch, b)
        return branch

    chance = size / (size - 1)
    root = Tree(f"models by 1 - cosine of their centred updates; independent ones join at about {chance:.3f}")
    grow(root, 2 * size - 2)
    return root
