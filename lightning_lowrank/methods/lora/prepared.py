"""State of an adapted module: how to load it, and how to merge it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowrank.methods.lora.choice import Choice, Settings
from lightning_lowrank.methods.lora.pairs import Place, detach, factors, gains, places

Factors = dict[str, list[Tensor]]


@dataclass
class Prepared:
    """State of an adapted module, in its attribute `lora_prepared`; a copy of the module has it, too.

    Attributes:
        settings: Options.
        choice: The chosen weights.
        frozen: Names of parameters that trained before.
        thawed: Names of parameters that did not train before.
        initial: Factors that were subtracted, by weight.
        norms: Norms of the original weights.
        bare: Whether only weights without pairs were loaded.
        with_base: Whether the weights that were loaded last include the base of the pairs.
        settled: Whether its pairs have been initialised or loaded; otherwise they are zero.
    """

    settings: Settings
    choice: Choice
    frozen: frozenset[str] = frozenset()
    thawed: frozenset[str] = frozenset()
    initial: dict[str, Factors] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    bare: bool = False
    with_base: bool = False
    settled: bool = False


def prepared(module: nn.Module | None) -> Prepared | None:
    """State of the pairs of a module; None if it has none."""
    return None if module is None else module.__dict__.get("lora_prepared")


def merge(module: nn.Module) -> nn.Module:
    """Add the pairs to the weights and remove everything of LoRA from a module. Keys, classes and trainable parameters
    are then those of before.
    """
    state = prepared(module)
    if state is None:
        raise ValueError(f"{type(module).__name__} has no LoRA pairs")
    found = places(module)
    for place in found:
        place.add()
    layers = {(id(place.layer), place.local): place for place in places(module, all_names=True)}
    for place in layers.values():  # one that is called in several places is there under each name
        if place.recipe.by_peft:
            parent, _, name = place.path.rpartition(".")
            setattr(module.get_submodule(parent), name, place.holder.base_layer)
        else:
            detach(place)
    module.__dict__.pop("peft_config", None)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is complete:
            del module._load_state_dict_pre_hooks[key]
    del module.__dict__["lora_prepared"]
    for name, parameter in module.named_parameters():
        if name in state.frozen or name in state.thawed:
            parameter.requires_grad_(name in state.frozen)
    return module


def merged_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of an adapted module with merged weights, under the keys that it would have without pairs."""
    found = places(module, all_names=True)
    gone = {key for place in found for key in place.factor_keys}
    merged: dict[str, Any] = {key: value for key, value in state.items() if key not in gone}
    for place in found:
        copy = Place(place.name, place.key, place.path, place.holder, place.layer, nn.Parameter(place.weight.clone()))
        copy.add()
        del merged[place.key]
        merged[place.original_key] = copy.weight.detach()
        merged |= {old: merged.pop(key) for key, old in place.moved.items() if key in merged}
    return merged


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names before peft wrapped their layers."""
    moved = {key: old for place in places(module) for key, old in place.moved.items()}
    return {moved.get(name, name): p for name, p in module.named_parameters()}


def frozen_keys(module: nn.Module) -> set[str]:
    """Keys of parameters that do not train."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def complete(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Make a state dict with only adapters, or with merged weights, loadable onto the existing base."""
    state = prepared(module)
    assert state is not None
    found = places(module, all_names=True)
    keys = [prefix + key for place in found for key in place.factor_keys]
    own = {prefix + key: value for key, value in module.state_dict().items()}
    if not any(key in state_dict for key in keys):
        state.bare = True
        for place in found:
            state_dict.pop(prefix + place.original_key, None)
            moved = {key: prefix + old for key, old in place.moved.items() if prefix + old in state_dict}
            state_dict |= {prefix + key: state_dict.pop(old) for key, old in moved.items()}
            state_dict.setdefault(prefix + place.key, own[prefix + place.key])
        state_dict |= {key: own[key] for key in keys}
        return
    state.settled, state.with_base = True, any(prefix + place.key in state_dict for place in found)
    if not state.with_base:
        state_dict |= {key: own[key] for name in frozen_keys(module) if (key := prefix + name) not in state_dict}


def copied(holder: nn.Module) -> Factors:
    """Factors by part, and gains, in host memory."""
    return {part: [p.detach().cpu().clone() for p in (*pair, *gains(holder))] for part, pair in factors(holder).items()}


@torch.no_grad()
def put(place: Place, values: Factors | None) -> None:
    """Give a weight other factors, if there are any."""
    for part, kept in (values or {}).items():
        for parameter, value in zip((*factors(place.holder)[part], *gains(place.holder)), kept, strict=True):
            parameter.copy_(value)


def take_out(place: Place, before: Factors | None, after: Factors | None) -> None:
    """Add back what was subtracted from a weight, and subtract something else."""
    kept = copied(place.holder)
    for values, sign in ((before, 1), (after, -1)):
        if values:
            put(place, values)
            place.add(sign)
    put(place, kept)


def same(one: Factors | None, other: Factors | None) -> bool:
    """Whether both are bit for bit equal, or do not exist."""
    if not one or not other:
        return not one and not other
    return all(torch.equal(x, y) for part in one for x, y in zip(one[part], other[part], strict=True))
