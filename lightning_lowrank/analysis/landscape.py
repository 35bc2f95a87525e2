"""`flat-directions`: directions of a small network's loss without curvature, and their causes."""

from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from lightning_lowrank.analysis.drawing import draw, numbers
from lightning_lowrank.analysis.flatness import Flatness, flatness
from lightning_lowrank.analysis.overwriting import tensors_file
from lightning_lowrank.analysis.showing import cell, print_json, save, show
from lightning_lowrank.analysis.tasks import inputs, task_of
from lightning_lowrank.maths.operators.flat_directions import FlatDirections
from lightning_lowrank.maths.operators.flat_directions import flat_directions as unchanged
from lightning_lowrank.models.checkpoints import Checkpoint

# Parts of the largest eigenvalue, below which eigenvalues are counted.
PARTS = (1e-12, 1e-9, 1e-6, 1e-3)
CAUSES = ("total", "duplicates", "scale", "rest")


def flat_directions(
    checkpoint: str,
    data: str,
    *,
    tolerance: float = 1e-10,
    match: list[str] | None = None,
    output: str | None = None,
    page: str | None = None,
    json: bool = False,
) -> None:
    """Print how many directions of a small network's loss landscape have no curvature, and in which parameters.

    Args:
        checkpoint: A file or folder.
        data: `module:function` that returns (module, {name: batches}, measure(module, batch) -> {"loss": mean}); the
            first data set is used.
        tolerance: Eigenvalues of the Hessian count as 0 if they are at most this fraction of the largest.
        match: Only parameters whose name matches one of these globs or `re:REGEX`.
        output: Safetensors file for all eigenvalues and the flat directions.
        page: HTML file for the share of flat directions in each parameter.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read or written, the data function fails, or the network has too many parameters.
    """
    file = None if output is None else tensors_file(output)
    task = task_of(data)
    task.module.load_state_dict(task.state(Checkpoint(checkpoint)))
    batches = next(iter(task.data.values()))
    found = flatness(task.module, batches, task.measure, match=match, tolerance=tolerance)
    causes = _causes(task.module, batches) if match is None else None
    if file is not None:
        save({"eigenvalues": found.eigenvalues, "flat": found.flat.contiguous()}, file)
    if page is not None:
        shares = {name: {"flat_share": share} for name, share in found.shares.items()}
        draw(page, {Path(checkpoint).name: {0: numbers("hessian", shares)}})
    if json:
        print_json(_told(found, causes))
    else:
        _print(found, causes, tolerance)


def _causes(module: nn.Module, batches: Any) -> FlatDirections | None:
    """Directions in which no output changes, and why; None where the network is no chain of linear layers."""
    if not isinstance(module, nn.Sequential):
        return None
    try:
        return unchanged(module, torch.cat([inputs(batch) for batch in batches]).double())
    except ValueError:
        return None


def _told(found: Flatness, causes: FlatDirections | None) -> dict[str, Any]:
    walked = dict(zip(("along_flat", "along_random", "loss"), found.walked, strict=True))
    return {
        "parameters": len(found.eigenvalues),
        "flat": found.flat.shape[1],
        "negative": found.negative,
        "below": {f"{part:g}": found.below(part) for part in PARTS},
        "gap": found.gap,
        "gradient_norm": found.gradient,
        **walked,
        "shares": found.shares,
        "outputs_unchanged": None if causes is None else {name: int(getattr(causes, name)) for name in CAUSES},
    }


def _print(found: Flatness, causes: FlatDirections | None, tolerance: float) -> None:
    size, flat = len(found.eigenvalues), found.flat.shape[1]
    show(
        f"{flat} of {size} directions are flat: |eigenvalue| at most {tolerance:g} times the largest, "
        f"{cell(float(found.eigenvalues.abs().max()))}. {found.negative} eigenvalues are negative"
    )
    if found.gap < 100:
        show(f"the number depends on the tolerance: the next eigenvalue is only {cell(found.gap)} times as large")
    show("; ".join(f"{found.below(part)} below {part:g}" for part in PARTS))
    show(f"norm of the gradient: {cell(found.gradient)}")
    along, anywhere, loss = map(cell, found.walked)
    show(
        f"a step of a tenth of the weights' norm changes the loss of {loss} by {along} along flat directions, by "
        f"{anywhere} along random ones"
    )
    if causes is not None:
        total, *parts = (int(getattr(causes, name)) for name in CAUSES)
        show(
            f"outputs on these data do not change along {total} directions: {parts[0]} from duplicate or unread "
            f"neurons, {parts[1]} from scales, {parts[2]} others"
        )
    table = Table(box=None)
    for heading in ("parameter", "share of flat directions"):
        table.add_column(heading, justify="left" if heading == "parameter" else "right")
    for name, share in found.shares.items():
        table.add_row(escape(name), f"{100 * share:.1f} %")
    show(table)
