"""From dense weights to factors and back: at the start, from a checkpoint, or during training."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowrank.methods.factorize.choice import Choice, Chosen, Settings
from lightning_lowrank.methods.factorize.factors import Factors, factorized
from lightning_lowrank.methods.factorize.layers import PARTS, Place, attach, detach, keys_of, places
from lightning_lowrank.methods.matrices import Owner

# Of each weight that was replaced, by id, what stands in its place.
Replaced = dict[int, list[nn.Parameter]]


@dataclass
class Prepared:
    """State of a factorized module, in its attribute `factorize_prepared`; a copy has it, too.

    Attributes:
        settings: Options.
        choice: The chosen weights.
        kept: Share of the energy of each weight that its factors keep, by name.
        waiting: Factors from a checkpoint that replace weights once there are optimizers.
        num_before: Parameters and bytes of the module before it was factorized.
    """

    settings: Settings
    choice: Choice
    num_before: tuple[int, int]
    kept: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, Factors] = field(default_factory=dict)

    def convert(self, ranks: Mapping[str, int]) -> Replaced:
        """Replace weights by factors if these are smaller; returns what replaces each of them.

        Args:
            ranks: Ranks by name.
        """
        new: Replaced = {}
        for one in self.choice.chosen:
            rank = ranks.get(one.name)
            if rank is None:
                continue
            if not one.saves(rank):
                self.choice.left_out[one.name] = f"{one.shape[0]} x {one.shape[1]} at rank {rank} would not be smaller"
                continue
            matrix = one.matrix()
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.settings.seed} {one.name}".encode()))
            factors = factorized(matrix, rank, self.settings.init, generator)
            whole = matrix.double().square().sum()
            self.kept[one.name] = float(factors.scale.double().square().sum() / whole) if whole else 1.0
            new |= put(one, factors)
        return new

    def convert_waiting(self) -> Replaced:
        """Put in the factors of a checkpoint."""
        new: Replaced = {}
        for one in self.choice.chosen:
            if one.name in self.waiting:
                new |= put(one, self.waiting.pop(one.name))
        return new


def prepared(module: nn.Module | None) -> Prepared | None:
    """State of the factors of a module; None if none were requested."""
    return None if module is None else module.__dict__.get("factorize_prepared")


def put(one: Chosen, factors: Factors) -> Replaced:
    """Replace a weight by factors."""
    owner = one.owners[0]
    old = getattr(owner.layer, owner.local)
    return {id(old): attach([(owner.layer, owner.local) for owner in one.owners], one.kind, factors)}


def size(module: nn.Module) -> tuple[int, int]:
    """Number and bytes of the parameters of a module."""
    several = list(module.parameters())
    return sum(p.numel() for p in several), sum(p.numel() * p.element_size() for p in several)


def densify(module: nn.Module) -> nn.Module:
    """Multiply the factors out. Keys, classes and order of the parameters are then those of the dense module.

    Raises:
        ValueError: The module has no factors.
    """
    if prepared(module) is None:
        raise ValueError(f"{type(module).__name__} has no factors from LowRankFactorize")
    shared: dict[int, list[Any]] = {}
    seen: set[tuple[int, str]] = set()
    for place in places(module, all_names=True):
        if (id(place.layer), place.local) not in seen:
            seen.add((id(place.layer), place.local))
            shared.setdefault(id(place.parameters[0]), []).append(place)
    for several in shared.values():
        detach(several)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is restructure:
            del module._load_state_dict_pre_hooks[key]
    del module.__dict__["factorize_prepared"]
    return module


def dense_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of a factorized module with multiplied weights, under the keys of the dense module."""
    dense: dict[str, Any] = dict(state)
    for place in places(module, all_names=True):
        for key in place.keys:
            del dense[key]
        dense[place.key] = place.dense().clone()
    return dense


@torch.no_grad()
def restructure(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before values are loaded: give the module the factors of the state dict, with their ranks."""
    state = prepared(module)
    assert state is not None
    now = {place.name: place for place in places(module)}
    for one in state.choice.chosen:
        names = [_keys(one, owner, prefix) for owner in one.owners]
        given: list[Tensor] = [state_dict[key] for key in names[0][1] if key in state_dict]
        if len(given) < len(names[0][1]):
            continue
        if place := now.get(one.name):
            _resize(place, given)
            continue
        weight = getattr(one.owners[0].layer, one.owners[0].local)
        left, scale, right = (value.to(weight) for value in given)
        factors = Factors(left, scale, right.flatten(1))
        if not state.settings.is_deferred:
            put(one, factors)
            continue
        # The optimizers are to be made for dense weights, as they were: the factors wait for them.
        state.waiting[one.name] = factors
        for dense, keys in names:
            for key in keys:
                state_dict.pop(key, None)
            state_dict[dense] = factors.product().reshape(weight.shape)


def _keys(one: Chosen, owner: Owner, prefix: str) -> tuple[str, list[str]]:
    """Of a weight and of its factors, in a state dict."""
    is_thin = one.kind != "direct"
    dense, begin = keys_of((prefix + owner.path).rstrip("."), owner.local, is_thin)
    return dense, [begin + end for end in (PARTS if is_thin else "012")]


def _resize(place: Place, given: Sequence[Tensor]) -> None:
    for own, value in zip(place.parameters, given, strict=True):
        if own.shape != value.shape:
            own.data = own.new_zeros(value.shape)
