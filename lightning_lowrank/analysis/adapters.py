"""Commands for adapters of checkpoints: `advise-ranks`, `extract-lora` and `merge`."""

import json as json_
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from lightning_lowrank.analysis.architectures import module_of
from lightning_lowrank.analysis.drawing import draw, numbers
from lightning_lowrank.analysis.low_rank import (
    Extracted,
    change_energies,
    extracted,
    has_inputs_as_rows,
    moved,
    with_adapter,
)
from lightning_lowrank.analysis.matrices import first, places
from lightning_lowrank.analysis.merging import refuse_strangers
from lightning_lowrank.analysis.overwriting import folder, tensors_file, writable
from lightning_lowrank.analysis.runs import write
from lightning_lowrank.analysis.showing import print_json, save, show, tell
from lightning_lowrank.models.adapter_folders import AdapterFolder, read_adapter, write_adapter
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.reports.rank_advice import advise

# What works with weights that are not finite.
WITHOUT = "leave them out with --exclude"
SHOWN = {"rank": "rank", "error": "error / change", "error_over_weight": "error / weight"}


def advise_ranks(
    a: str,
    b: str,
    *,
    budget: str,
    method: Literal["lora", "galore"] = "lora",
    least: int = 0,
    match: list[str] | None = None,
    exclude: list[str] | None = None,
    model: str | None = None,
    output: str | None = None,
    page: str | None = None,
    json: bool = False,
) -> None:
    """Print a rank for each matrix. Within the budget, these ranks capture the largest possible share of what training
    changed.

    Args:
        a: Checkpoint before training: a file or folder.
        b: Checkpoint after training.
        budget: Budget for all ranks together: a count of numbers, such as 200000, or memory, such as "8 MB".
        method: The method that will use the ranks, lora or galore.
        least: Smallest rank of a matrix that changed.
        match: Only matrices whose name matches one of these globs or `re:REGEX`.
        exclude: Leave these out.
        model: `module:function` that makes the module, whose classes tell how fused weights are split.
        output: JSON file for the ranks; extract-lora reads it.
        page: HTML file for all numbers.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read, a pattern matches nothing, or the budget is too small.
    """
    file = None if output is None else writable(output)
    one, other = Checkpoint(a), Checkpoint(b)
    found = places(one, module_of(one, model), match=match, exclude=exclude)
    watched = track(found, escape(b), console=Console(stderr=True), transient=True)
    for checkpoint in (one, other):
        checkpoint.refuse_infinite((n for place in found for n in place.names if n in checkpoint.shapes), WITHOUT)
    energies = dict(change_energies(one, other, watched))
    if not energies:
        raise ValueError(f"{a} and {b} have no matrix of the same name and shape")
    advice = advise(energies, budget, method=method, least=least)
    if file is not None:
        write(file, advice.text())
    if page is not None:
        rows = {name: {"rank": float(rank), "captured": advice.share(name)} for name, rank in advice.ranks.items()}
        draw(page, {Path(b).name: {0: numbers("advice", rows)}})
    if json:
        print_json(advice.json())
    else:
        show(advice)


def extract_lora(
    a: str,
    b: str,
    *,
    energy: float = 0.9,
    ranks: str | None = None,
    match: list[str] | None = None,
    exclude: list[str] | None = None,
    within: str = "",
    model: str | None = None,
    output: str,
    page: str | None = None,
    json: bool = False,
) -> None:
    """Write what training changed as a LoRA adapter that peft loads onto A, and print which part of each change it
    lacks.

    Args:
        a: The base: a file or folder.
        b: The fine-tuned checkpoint.
        energy: Share of the energy of each change that its pair keeps.
        ranks: JSON file with a rank for each name, as advise-ranks writes it. It replaces the energy.
        match: Only weights whose name matches one of these globs or `re:REGEX`.
        exclude: Leave these out.
        within: Prefix of the names of the part that peft gets, such as "model".
        model: `module:function` that makes the module, whose classes tell which weights have their inputs as rows.
        output: Folder to write.
        page: HTML file for all numbers.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read, a pattern matches nothing, or no weight changed.
    """
    to = folder(output)
    one, other = Checkpoint(a), Checkpoint(b)
    module, prefix = module_of(one, model), f"{within}." if within else ""
    chosen = {name for place in places(one, module, match=match, exclude=exclude) for name in place.names}
    changed, others = moved(one, other, module)
    names = [name for name in changed if name in chosen and name.startswith(prefix)]
    if not names:
        refuse_strangers(one, [other])
        raise ValueError(f"none of the chosen weights of {a} changed in {b}; these did: {first(changed)}")
    told = None if ranks is None else _ranks(Path(ranks), set(chosen) - set(names))
    for file in (one, other):
        file.refuse_infinite(names, WITHOUT)
    found = list(extracted(one, other, names, energy=energy, ranks=told, module=module))
    pairs = {row.path.removeprefix(prefix): row.pair for row in found if row.pair is not None}
    if not pairs:
        raise ValueError(f"{ranks} contains no rank above 0")
    matrices = [row.name for row in found if row.pair is not None and not row.pair.of_embedding]
    as_rows = bool(matrices) and all(has_inputs_as_rows(name, module) for name in matrices)
    write_adapter(to, AdapterFolder(pairs, base=a, inputs_as_rows=as_rows))
    left = [*others, *(name for name in changed if name not in names)]
    if page is not None:
        draw(page, {Path(output).name: {0: numbers("adapter", {row.name: _numbers(row) for row in found})}})
    if json:
        print_json({row.name: {"shape": row.shape, **_numbers(row)} for row in found} | {"left_out": left})
    else:
        tell(f"{a} -> {b}", [(row.name, row.shape, "", _numbers(row)) for row in found], SHOWN)
        size = sum(pair.a.numel() + pair.b.numel() for pair in pairs.values())
        show(f"{escape(output)}: {len(pairs)} pairs, {size} numbers")
        if left:
            show(f"changed, but not in the adapter: {escape(first(left))}")


def merge(adapter: str, base: str, *, within: str = "", model: str | None = None, output: str) -> None:
    """Write the base checkpoint with peft's LoRA adapter merged into its weights.

    Args:
        adapter: The folder of the adapter.
        base: The checkpoint on which it was trained: a file or folder.
        within: Prefix of the names of the part that the adapter is for, such as "model".
        model: `module:function` that makes the module, whose classes tell which weights have their inputs as rows.
        output: Safetensors file to write.

    Raises:
        ValueError: A file cannot be read or written, the adapter is not for this base, or weights are not finite.
    """
    file = tensors_file(output)
    start, pairs = Checkpoint(base), read_adapter(adapter)
    start.refuse_infinite()
    tensors = dict(with_adapter(start, pairs, within, module_of(start, model)))
    save({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    show(f"{escape(output)}: {len(tensors)} tensors, the adapter changes {len(pairs.pairs)} of them")


def _ranks(file: Path, unmoved: set[str]) -> dict[str, int]:
    """Ranks of a file, without those of weights that did not move."""
    try:
        found = json_.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    ranks = found.get("ranks", found) if isinstance(found, dict) else None
    if not isinstance(ranks, dict) or any(type(rank) is not int or rank < 0 for rank in ranks.values()):
        raise ValueError(
            f"{file} contains no ranks. Expected: weight names with whole numbers, at the top level or under 'ranks'"
        )
    return {name: rank for name, rank in ranks.items() if name not in unmoved}


def _numbers(row: Extracted) -> dict[str, float]:
    rank = 0 if row.pair is None else row.pair.rank
    return {"rank": float(rank), "error": row.error, "error_over_weight": row.error_over_weight}
