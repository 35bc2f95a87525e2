"""Adapters of checkpoints: `advise-ranks`, `extract-lora` and `merge`."""

import json as json_
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from lightning_lowrank.analysis.architectures import module_of
from lightning_lowrank.analysis.drawing import draw, numbers
from lightning_lowrank.analysis.low_rank import Extracted, change_energies, extracted, moved, with_adapter
from lightning_lowrank.analysis.matrices import first, places
from lightning_lowrank.analysis.merging import refuse_strangers
from lightning_lowrank.analysis.showing import print_json, save, show, tell
from lightning_lowrank.models.adapter_folders import AdapterFolder, read_adapter, write_adapter
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.reports.rank_advice import advise

# What works with weights that are not finite.
WITHOUT = "leave them out by exclude"
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
    """Print a rank for each matrix, that together capture the most of what training changed, under a budget.

    Args:
        a: A file or folder, before training.
        b: Another one, after it.
        budget: Numbers that all ranks together may take, as 200000; or memory, as "8 MB".
        method: Who takes the ranks, lora or galore.
        least: Rank of every matrix that moved at all.
        match: Only matrices whose name fits one of these globs or `re:REGEX`.
        exclude: Not these.
        model: `module:function` that makes the module, whose classes say how fused weights divide.
        output: A JSON file for the ranks, which extract-lora reads.
        page: An HTML file for all numbers.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read, an argument fits nothing, or the budget is too small.
    """
    one, other = Checkpoint(a), Checkpoint(b)
    found = places(one, module_of(one, model), match=match, exclude=exclude)
    watched = track(found, escape(b), console=Console(stderr=True), transient=True)
    for file in (one, other):
        file.refuse_infinite((n for place in found for n in place.names if n in file.shapes), WITHOUT)
    energies = dict(change_energies(one, other, watched))
    if not energies:
        raise ValueError(f"{a} and {b} have no matrix in common by name and shape")
    advice = advise(energies, budget, method=method, least=least)
    if output is not None:
        advice.save(output)
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
    """Write what training changed as a LoRA adapter that peft loads onto A, and print what it leaves of each change.

    Args:
        a: A file or folder, the base.
        b: Another one, fine-tuned.
        energy: Share of the energy of each change that its pair keeps.
        ranks: A JSON file with ranks by name, as advise-ranks writes it, instead.
        match: Only weights whose name fits one of these globs or `re:REGEX`.
        exclude: Not these.
        within: The part of the model that peft gets, such as "model": the beginning of names.
        model: `module:function` that makes the module, whose classes say which weights have their inputs as rows.
        output: The folder to write.
        page: An HTML file for all numbers.
        json: Print all numbers.

    Raises:
        ValueError: A file cannot be read, an argument fits nothing, or no weight changed.
    """
    one, other = Checkpoint(a), Checkpoint(b)
    module, prefix = module_of(one, model), f"{within}." if within else ""
    chosen = {name for place in places(one, module, match=match, exclude=exclude) for name in place.names}
    changed, others = moved(one, other, module)
    names = [name for name in changed if name in chosen and name.startswith(prefix)]
    if not names:
        refuse_strangers(one, [other])
        raise ValueError(f"no weight of {a} that is asked for changed in {b}; those that did are {first(changed)}")
    told = None if ranks is None else _ranks(Path(ranks), set(chosen) - set(names))
    for file in (one, other):
        file.refuse_infinite(names, WITHOUT)
    found = list(extracted(one, other, names, energy=energy, ranks=told, module=module))
    pairs = {row.path.removeprefix(prefix): row.pair for row in found if row.pair is not None}
    if not pairs:
        raise ValueError(f"{ranks} has no rank above 0")
    write_adapter(output, AdapterFolder(pairs, base=a))
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
            show(f"changed, and not in the adapter: {escape(first(left))}")


def merge(adapter: str, base: str, *, within: str = "", model: str | None = None, output: str) -> None:
    """Write a checkpoint with what a LoRA adapter of peft adds put into its weights.

    Args:
        adapter: The folder of the adapter.
        base: A file or folder that it was trained on.
        within: The part of the model that the adapter is for, such as "model": the beginning of names.
        model: `module:function` that makes the module, whose classes say which weights have their inputs as rows.
        output: The safetensors file to write.

    Raises:
        ValueError: A file cannot be read or written, the adapter is not for this base, or weights are not finite.
    """
    start, pairs = Checkpoint(base), read_adapter(adapter)
    start.refuse_infinite()
    tensors = dict(with_adapter(start, pairs, within, module_of(start, model)))
    save({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(output))
    show(f"{escape(output)}: {len(tensors)} tensors, {len(pairs.pairs)} of them with what a pair adds")


def _ranks(file: Path, unmoved: set[str]) -> dict[str, int]:
    """Ranks of a file, without those of weights that did not move."""
    try:
        found = json_.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    ranks = found.get("ranks", found) if isinstance(found, dict) else None
    if not isinstance(ranks, dict) or any(type(rank) is not int or rank < 0 for rank in ranks.values()):
        raise ValueError(f"{file} has no ranks: a whole number by name of each weight, or these under 'ranks'")
    return {name: rank for name, rank in ranks.items() if name not in unmoved}


def _numbers(row: Extracted) -> dict[str, float]:
    rank = 0 if row.pair is None else row.pair.rank
    return {"rank": float(rank), "error": row.error, "error_over_weight": row.error_over_weight}
