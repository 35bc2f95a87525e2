"""Commands for a network and its data: `connect`, `masks` and `importance`."""

import json as json_
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.func import functional_call

from lightning_lowrank.analysis.architectures import module_of
from lightning_lowrank.analysis.connect.line import Line, line
from lightning_lowrank.analysis.connect.matching import Matched, matched
from lightning_lowrank.analysis.drawing import draw, numbers
from lightning_lowrank.analysis.importance import Importance
from lightning_lowrank.analysis.importance import importance as importance_of
from lightning_lowrank.analysis.matrices import places
from lightning_lowrank.analysis.overlaps import Overlap, overlaps
from lightning_lowrank.analysis.overwriting import tensors_file
from lightning_lowrank.analysis.showing import cell, print_json, save, show
from lightning_lowrank.analysis.tasks import Task, inputs, task_of
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.models.tracing import traced
from lightning_lowrank.models.unit_groups import Group, groups_of
from lightning_lowrank.reports.vectors import Row


def connect(
    a: str,
    b: str,
    data: str,
    *,
    points: int = 11,
    specification: str | None = None,
    calibrate: str | None = None,
    output: str | None = None,
    page: str | None = None,
    match: bool = False,
    json: bool = False,
) -> None:
    """Print loss and accuracy along the straight line between two checkpoints, and the barrier.

    Args:
        a: Checkpoint A: a file or folder.
        b: Checkpoint B, of the same architecture.
        data: `module:function` that returns (module, {name: batches}, measure(module, batch) -> {name: mean}).
        points: Number of places along the line, both ends included.
        specification: JSON file of the units that can be permuted, {group: [[tensor, axis], ...]}. Default: found by
            torch.fx.
        calibrate: Name of the data from which batch norms recompute their statistics at each place.
        output: Safetensors file for B with its units permuted.
        page: HTML file for the curves along the line; its steps are percent of the way.
        match: First permute the units of B to match those of A. It is an error if B then computes something else.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read, the data function fails, or no units can be permuted.
    """
    file = None if output is None else tensors_file(output)
    if file is not None and not match:
        raise ValueError(f"--output={output} is for B with its units permuted; add --match")
    task = task_of(data)
    if calibrate is not None and calibrate not in task.data:
        raise ValueError(f"--calibrate={calibrate}: {data} has {list(task.data)}")
    one, other = (task.untied(task.state(Checkpoint(path))) for path in (a, b))
    lines = {"as they are": line(task.module, one, other, task.data, task.measure, points=points, calibrate=calibrate)}
    found = None
    if match:
        found = _matched(task, one, other, specification)
        lines["matched"] = line(
            task.module, one, found.state, task.data, task.measure, points=points, calibrate=calibrate
        )
        if file is not None:
            save({name: tensor.contiguous() for name, tensor in task.whole(found.state).items()}, file)
    if page is not None:
        draw(page, {title: _along(one) for title, one in lines.items()})
    if json:
        print_json(
            {"places": next(iter(lines.values())).places}
            | {name: {"values": one.values, "barriers": one.barriers} for name, one in lines.items()}
            | ({} if found is None else {"used": found.used, "dropped": found.dropped, "deviation": found.deviation})
        )
    else:
        _draw(lines, found)


def masks(
    a: str,
    b: str,
    *,
    density: float | None = None,
    scope: Literal["global", "layer"] = "global",
    match: list[str] | None = None,
    exclude: list[str] | None = None,
    model: str | None = None,
    page: str | None = None,
    json: bool = False,
) -> None:
    """Print how similar the masks of two checkpoints are, compared with chance.

    Args:
        a: Checkpoint A: a file or folder.
        b: Checkpoint B.
        density: Share of the weights that the masks keep, the largest ones. Default: all weights that are not zero.
        scope: Whether the share is taken of all weights together ("global") or of each tensor ("layer").
        match: Only matrices whose name matches one of these globs or `re:REGEX`.
        exclude: Leave these out.
        model: `module:function` that makes the module.
        page: HTML file for all numbers.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read, the files have no tensor in common, the density is out of range, or it is
            missing and no weight is zero.
    """
    files = Checkpoint(a), Checkpoint(b)
    first, second = (
        {one.site.name: one for one in places(file, module_of(file, model), match=match, exclude=exclude)}
        for file in files
    )
    common = {n: p for n, p in first.items() if n in second and second[n].site.shape == p.site.shape}
    if not common:
        raise ValueError(
            f"{a} has {list(first)[:4]} and {b} has {list(second)[:4]}: no tensor has the same name and shape in both"
        )
    found = list(overlaps(*files, common, density, scope))
    if density is None and all(one.densities == (1.0, 1.0) for one in found):
        raise ValueError(
            "no weight is zero in either file; choose the share of weights that the masks keep, such as --density 0.2"
        )
    if page is not None:
        draw(page, {f"{Path(a).stem} and {Path(b).name}": {0: numbers("mask", {o.name: _of_masks(o) for o in found})}})
    if json:
        print_json({o.name: {key: value for key, value in vars(o).items() if key != "name"} for o in found})
        return
    table = Table(title="masks", box=None)
    for heading in ("matrix", "density A", "density B", "Jaccard", "chance", "Hamming", "chance"):
        table.add_column(heading, justify="left" if heading == "matrix" else "right", overflow="fold")
    for o in found:
        table.add_row(escape(o.name), *map(cell, _of_masks(o).values()))
    show(table)


def importance(checkpoint: str, data: str, *, top: int = 5, page: str | None = None, json: bool = False) -> None:
    """Print how important attention heads and neurons are: the gradient of the loss with respect to a gate on each.

    Args:
        checkpoint: A file or folder.
        data: `module:function` that returns (module, {name: batches}, measure(module, batch) -> {"loss": mean}); the
            first data set is used.
        top: Number of units that the table names in each layer.
        page: HTML file for all numbers.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read, the data function fails, or there are no heads and neurons.
    """
    task = task_of(data)
    task.module.load_state_dict(task.state(Checkpoint(checkpoint)))
    found = importance_of(task.module, next(iter(task.data.values())), task.measure)
    if page is not None:
        draw(page, {Path(checkpoint).name: {0: [row for kind in ("head", "neuron") for row in _of_units(found, kind)]}})
    if json:
        print_json({f"{one.kind}s of {one.name}": one.values.tolist() for one in found})
        return
    table = Table(title="mean |dL/d gate|", box=None)
    for heading in ("layer", "units", f"top {top}: unit (value)", "share of the top 10 %"):
        table.add_column(heading, overflow="fold")
    for one in found:
        values, order = one.values.sort(descending=True)
        named = ", ".join(
            f"{unit} ({value:.2g})" for unit, value in zip(order[:top].tolist(), values[:top].tolist(), strict=True)
        )
        table.add_row(escape(one.name), f"{len(values)} {one.kind}s", named, cell(one.top_share))
    show(table)


def _along(line: Line) -> dict[int, list[Row]]:
    """What the page has of a line: data sets as its layers, percent of the way as its steps."""
    found: dict[int, list[Row]] = {}
    for i, place in enumerate(line.places):
        sets: dict[str, dict[str, float]] = {}
        for name, values in line.values.items():
            data, _, quantity = name.rpartition("/")
            sets.setdefault(data, {})[quantity] = values[i]
        found[round(100 * place)] = numbers("line", sets)
    return found


def _of_masks(one: Overlap) -> dict[str, float]:
    names = ("density_a", "density_b", "jaccard", "jaccard_chance", "hamming", "hamming_chance")
    return dict(zip(names, (*one.densities, one.jaccard, one.chance, one.hamming, one.hamming_chance), strict=True))


def _of_units(found: Sequence[Importance], kind: str) -> list[Row]:
    """What the page has of heads: each by itself; of neurons, of which there are many, layer by layer."""
    several = [one for one in found if one.kind == kind]
    each = {f"{one.name} {i}": {"importance": value} for one in several for i, value in enumerate(one.values.tolist())}
    layers = {
        one.name: {
            "importance_mean": float(one.values.mean()),
            "importance_largest": float(one.values.max()),
            "top_tenth_share": one.top_share,
        }
        for one in several
    }
    return [*numbers(kind, each if kind == "head" else {}), *numbers(kind, layers)]


def _matched(task: Task, one: dict[str, Any], other: dict[str, Any], specification: str | None) -> Matched:
    """B rearranged; what it computes is looked at on the first batch of the first data set."""
    batch = inputs(next(iter(next(iter(task.data.values())))))
    task.module.eval()
    outputs = partial(_output, task.module, batch)
    with suppress(Exception):  # a network that has its own float32 somewhere
        wide = partial(_output, deepcopy(task.module).double(), batch.double() if batch.is_floating_point() else batch)
        wide(_double(other))
        # Rounding is then no difference.
        one, other, outputs = _double(one), _double(other), wide
    found = matched(one, other, _groups(task, one, specification), outputs)
    own = task.module.state_dict()
    return replace(found, state={name: tensor.to(own[name].dtype) for name, tensor in found.state.items()})


def _double(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


@torch.no_grad()
def _output(module: nn.Module, batch: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that a network puts out, or the first of several, as the states or the logits of Hugging Face's."""
    result = functional_call(module, dict(state), (batch,))
    first = result if isinstance(result, torch.Tensor) else next(iter(_several(result)), None)
    if not isinstance(first, torch.Tensor):
        raise ValueError(f"{type(module).__name__} returns a {type(result).__name__}; expected a tensor")
    return first


def _several(result: Any) -> Iterable[Any]:
    return result.values() if isinstance(result, Mapping) else result if isinstance(result, list | tuple) else ()


def _groups(task: Task, state: dict[str, Any], specification: str | None) -> list[Group]:
    if specification is None:
        return traced(task.module)
    try:
        given = json_.loads(Path(specification).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{specification} is not a JSON file of groups: {error}") from error
    return groups_of(given, {name: tensor.shape for name, tensor in state.items()})


def _draw(lines: dict[str, Line], found: Matched | None) -> None:
    for title, one in lines.items():
        table = Table(title=title, box=None)
        for heading in ("place", *one.values):
            table.add_column(heading, justify="right")
        for row in zip(one.places, *one.values.values(), strict=True):
            table.add_row(*map(cell, row))
        table.add_row("barrier", *(cell(one.barriers[name]) for name in one.values), style="bold")
        show(table)
    if found is not None:
        dropped = f"; {found.dropped} cannot be permuted" if found.dropped else ""
        units = f"{len(found.used)} group(s) of units permuted{dropped}"
        show(escape(f"{units}; outputs of B before and after differ by {found.deviation:.1e}"))
