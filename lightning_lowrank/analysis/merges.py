"""`merge-models`: several fine-tuned models as one."""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from rich.markup import escape
from rich.table import Table

from lightning_lowrank.analysis.drawing import draw, numbers
from lightning_lowrank.analysis.merging import Conflict, conflicts, merged, refuse_strangers
from lightning_lowrank.analysis.overwriting import tensors_file
from lightning_lowrank.analysis.showing import cell, print_json, save, show
from lightning_lowrank.models.checkpoints import Checkpoint


def merge_models(
    models: list[str],
    *,
    base: str,
    method: str = "mean",
    scale: float | None = None,
    density: float | None = None,
    seed: int = 0,
    output: str = "merged.safetensors",
    page: str | None = None,
    json: bool = False,
) -> None:
    """Merge fine-tuned models into one, and print which of them conflict.

    Args:
        models: Files or folders, at least two.
        base: The checkpoint that they were fine-tuned from.
        method: One of mean, task-arithmetic, ties, dare, tsv, iso-c.
        scale: Factor of the merged change. Default: 0.3 for task-arithmetic and dare, 1 for the others.
        density: Share of the entries to keep, for ties (default 0.2) and dare (default 0.1).
        seed: Seed of the random choice of dare.
        output: The safetensors file to write.
        page: HTML file for cosines and overlaps of all pairs and matrices.
        json: Print cosines and overlaps of all pairs and matrices.

    Raises:
        ValueError: A file cannot be read or written, the models have different architectures, or weights are not
            finite.
    """
    file = tensors_file(output)
    start, ends = Checkpoint(base), [Checkpoint(path) for path in models]
    refuse_strangers(start, ends)
    for model in (start, *ends):
        model.refuse_infinite(start.shapes)
    tensors = dict(merged(start, ends, method, scale=scale, density=density, seed=seed))
    matrices = [name for name, shape in start.shapes.items() if len(shape) > 1 and min(shape) > 1]
    found = list(conflicts(start, ends, matrices))
    save({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    if page is not None:
        draw(page, {pair: {0: numbers("conflict", rows)} for pair, rows in _by_pair(found, models).items()})
    if json:
        print_json(_by_pair(found, models))
    else:
        show(_table(found, models))
        show(f"{escape(output)}: {len(tensors)} tensors, merged by {method}")


def _by_pair(found: Sequence[Conflict], models: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    pairs: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for one in found:
        i, j = one.pair
        values = {"cosine": one.cosine, "overlap": one.overlap, "overlap_chance": one.chance}
        pairs[f"{models[i]} and {models[j]}"][one.name] = values
    return pairs


def _table(found: Sequence[Conflict], models: Sequence[str]) -> Table:
    """Means over matrices, the pair that conflicts most first."""
    pairs: dict[tuple[int, int], list[Conflict]] = defaultdict(list)
    for one in found:
        pairs[one.pair].append(one)
    rows = [
        (
            _mean([one.cosine for one in several]),
            _mean([one.overlap / one.chance for one in several]),
            f"{models[i]} and {models[j]}",
        )
        for (i, j), several in pairs.items()
    ]
    table = Table(title="changes of pairs of models, means over matrices", box=None)
    for heading in ("pair", "cosine", "overlap of top directions / chance"):
        table.add_column(heading, justify="left" if heading == "pair" else "right", overflow="fold")
    for cosine, overlap, pair in sorted(rows):
        table.add_row(escape(pair), cell(cosine), cell(overlap))
    return table


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite: a matrix that did not move has no direction."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan
