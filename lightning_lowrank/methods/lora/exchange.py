"""Pairs to and from peft's adapter folders.

Shape letters:  M outputs, N inputs of a layer   R rank of a pair
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lowrank.methods.lora.pairs import Place, factors, gains, places, products, wide
from lightning_lowrank.methods.lora.prepared import Prepared, named, prepared, take_out
from lightning_lowrank.models.adapter_folders import AdapterFolder, Pair, read_adapter, write_adapter

# Of the largest singular value: what a smaller rank may lose of a change.
LOST = 1e-5


def export(module: nn.Module, folder: str | Path, within: str, base: str | None) -> None:
    """Write the pairs of a part of a module in the format of peft.

    Raises:
        ValueError: There are none, or peft has no adapter for one of them.
    """
    state, prefix = _state(module), f"{within}." if within else ""
    found = [place for place in places(module) if place.name.startswith(prefix)]
    if not found:
        raise ValueError(f"within={within!r} contains no pairs; the pairs are {[p.name for p in places(module)][:10]}")
    strange = next((place.name for place in found if place.recipe.kind == "direct"), None)
    if strange is not None:
        raise ValueError(
            f"{strange!r} is used without calling the layer, which peft's folders cannot express; merge it, or "
            "exclude it"
        )
    pairs = {place.path.removeprefix(prefix): _whole_pair(place, state) for place in found}
    trained = [name for name in state.choice.trained if name.startswith(prefix)]
    known = named(module)
    whole = {name.removeprefix(prefix): known[name].detach() for name in trained}
    kinds = {place.recipe.kind for place in found} - {"embedding"}
    write_adapter(folder, AdapterFolder(pairs, whole, base, inputs_as_rows=kinds == {"transposed"}))


@torch.no_grad()
def fill(module: nn.Module, folder: str | Path, within: str) -> None:
    """Load the values of a folder into the pairs of a part of a module.

    Raises:
        ValueError: The folder adapts other layers, or has a larger rank; nothing has changed.
    """
    state, prefix = _state(module), f"{within}." if within else ""
    adapter = read_adapter(folder)
    found = {place.path.removeprefix(prefix): place for place in places(module) if place.name.startswith(prefix)}
    if missing := sorted(set(adapter.pairs) - set(found)):
        raise ValueError(
            f"{folder} adapts {missing[:10]}, which have no pairs here; add them to match. Pairs exist for "
            f"{sorted(found)[:10]}"
        )
    values = {path: _own_factors(found[path], pair) for path, pair in adapter.pairs.items()}
    for path, place in found.items():
        take_out(place, state.initial.pop(place.name, None), None)
        for part, (a, b) in factors(place.holder).items():
            first, second = values[path][part] if path in values else (a, torch.zeros_like(b))
            a.copy_(first.reshape(a.shape))
            b.copy_(second)
        for gain in gains(place.holder):
            gain.fill_(1)
        place.holder.lora_waits = False  # type: ignore[assignment]
    state.settled = True
    for name, tensor in adapter.whole.items():
        named(module)[prefix + name].copy_(tensor)


def _whole_pair(place: Place, state: Prepared) -> Pair:
    """All parts as one pair, with what was taken out of the weight taken off it: of twice the rank then."""
    recipe, taken = place.recipe, state.initial.get(place.name)
    firsts, seconds = [], []
    for part, (a, b) in products(place.holder).items():
        for gain in gains(place.holder):  # directions that were taken away are left out
            kept = (gain.flatten() != 0).nonzero().flatten() if gain.any() else torch.arange(1, device=a.device)
            a, b = a[kept], b[:, kept]
        first, second = [a.detach()], [b.detach()]
        if taken is not None:
            a0, b0 = (t.to(a) for t in taken[part])
            first, second = [*first, -a0], [*second, b0]
        firsts.append(torch.cat(first))
        seconds.append(torch.cat(second, 1))
    b = torch.block_diag(*seconds)
    order = getattr(place.holder, "lora_order", None)
    return Pair(torch.cat(firsts), b if order is None else b[order], recipe.scaling, recipe.kind == "embedding")


def _own_factors(place: Place, pair: Pair) -> Mapping[str, tuple[Tensor, Tensor]]:
    """A pair of a folder as those of the parts of a weight, in its scaling."""
    recipe = place.recipe
    b = wide(pair.b) * (pair.scaling / recipe.scaling)
    order = getattr(place.holder, "lora_order", None)
    rows = (b if order is None else b[order.argsort().to(b.device)]).split([size for _, size in recipe.parts])
    a = wide(pair.a).flatten(1)
    return {
        part: _of_rank(place.name, recipe.rank, a, some) for (part, _), some in zip(recipe.parts, rows, strict=True)
    }


def _of_rank(
    name: str, rank: int, a: Float[Tensor, "R N"], b: Float[Tensor, "M R"]
) -> tuple[Float[Tensor, "K N"], Float[Tensor, "M K"]]:
    """The same product of another rank."""
    if len(a) <= rank:
        more = rank - len(a)
        return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), more)], 1)
    left, first = torch.linalg.qr(b)
    right, second = torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(first @ second.mT)
    if len(s) > rank and s[rank] > LOST * s[0]:
        raise ValueError(f"{name!r}: the folder has rank {(s > LOST * s[0]).sum().item()}, larger than r={rank}")
    root = s[:rank].sqrt()
    return root[:, None] * (vt[:rank] @ right.mT), (left @ u[:, :rank]) * root


def _state(module: nn.Module) -> Prepared:
    state = prepared(module)
    if state is None:
        raise ValueError(f"{type(module).__name__} has no LoRA pairs; call prepare(module) first")
    return state
