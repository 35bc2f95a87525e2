"""Smaller dense layers for a network in which whole units are pruned.

Shape letters:  G units of a group
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from lightning_lowrank.methods.lottery.fewer_heads import can_lose_heads, take_heads
from lightning_lowrank.models.axes import is_transposed
from lightning_lowrank.models.fused import NUM_HEADS
from lightning_lowrank.models.tracing import features, heads
from lightning_lowrank.models.unit_groups import Binding, Group

# Largest difference of outputs, over the largest output: sums are taken in another order.
TOLERANCE = 1e-5

# Attributes that say how long an axis of a layer's weight is, by axis of its outputs.
OUTPUTS = ("out_features", "out_channels", "num_features", "embedding_dim", "nf")
INPUTS = ("in_features", "in_channels", "nx")


def export(module: nn.Module, inputs: Any, counts: Mapping[str, int]) -> nn.Module:
    """A copy without the units that no layer reads.

    Raises:
        ValueError: The module fails on the inputs, or no unit can be removed.
    """
    try:
        expected = _outputs(module, inputs)
    except Exception as error:  # the user's own code
        raise ValueError(f"export: {type(module).__name__} fails on the inputs: {error}") from error
    smaller, left = module, []
    for group in [*heads(module, counts), *_features(module)]:
        gone = _unread(smaller, group)
        if gone is not None and gone.any():
            tried = _without(smaller, group, gone)
            if _is_same(tried, inputs, expected):
                smaller = tried
            else:
                left.append(group.name)
    if smaller is module:
        why = f"removing units of {left} would change the outputs" if left else "some layer reads each unit"
        raise ValueError(f"export: no unit of {type(module).__name__} can be removed: {why}")
    return smaller


def _features(module: nn.Module, before: str = "") -> Iterator[Group]:
    """Groups of neurons and channels; of what cannot be traced, those within its parts."""
    try:
        groups = features(nn.Sequential(module))  # within a sequence layers that have a rule are read by it
    except ValueError:
        for name, child in module.named_children():
            yield from _features(child, f"{before}{name}.")
    else:
        for group in groups:
            names = (before + one.name.removeprefix("0.") for one in group.bindings)
            moved = [replace(one, name=name) for one, name in zip(group.bindings, names, strict=True)]
            yield Group(before + group.name.removeprefix("0."), group.size, tuple(moved))


def _unread(module: nn.Module, group: Group) -> Bool[Tensor, " G"] | None:
    """Units whose every reader is zeros; None where nothing is known to read them, a norm is over all of them, or a
    tensor has several owners.
    """
    tensors = dict(module.named_parameters())
    owners = Counter(id(p) for one in module.modules() for p in one._parameters.values() if p is not None)
    found = []
    for binding in group.bindings:
        path, _, local = binding.name.rpartition(".")
        layer = module.get_submodule(path)
        if binding.start + group.size * binding.inner > getattr(layer, local).shape[binding.dim]:
            return None  # a part of it is gone with another group
        if isinstance(layer, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            return None
        if isinstance(layer, nn.MultiheadAttention) and (binding.dim or not can_lose_heads(layer)):
            return None
        if owners[id(tensors.get(binding.name))] > 1:
            return None
        if _reads(layer, binding):
            found.append((group.view(tensors, binding) == 0).all(1))
    if not found:
        return None
    gone = torch.stack(found).all(0)
    return gone if not gone.all() else gone.index_fill(0, torch.tensor(0, device=gone.device), False)


def _reads(layer: nn.Module, binding: Binding) -> bool:
    """Whether the units are what comes into the layer."""
    if not isinstance(layer, nn.Linear | _ConvNd) or not binding.name.endswith("weight") or _is_depthwise(layer):
        return False
    return binding.dim == (0 if isinstance(layer, _ConvTransposeNd) else 1)


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd) and layer.groups > 1


@torch.no_grad()
def _without(module: nn.Module, group: Group, gone: Bool[Tensor, " G"]) -> nn.Module:
    """A copy whose tensors have these units no more."""
    smaller = copy.deepcopy(module)
    for (name, dim), bindings in _by_axis(group).items():
        path, _, local = name.rpartition(".")
        layer = smaller.get_submodule(path)
        tensor = getattr(layer, local)
        keep = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
        for one in bindings:
            within = (~gone).repeat_interleave(one.inner).to(keep.device)
            keep[one.start : one.start + len(within)] = within
        cut = tensor.detach().index_select(dim, keep.nonzero().flatten()).clone()
        if isinstance(tensor, nn.Parameter):
            layer._parameters[local] = nn.Parameter(cut, tensor.requires_grad)
        else:
            layer._buffers[local] = cut
        _resize(layer, bindings[0], cut)
    if group.name.endswith(" heads"):
        _count_heads(smaller, group, (~gone).nonzero().flatten().cpu())
    return smaller


def _by_axis(group: Group) -> dict[tuple[str, int], list[Binding]]:
    """All that lies in one axis of a tensor: queries, keys and values may."""
    found: dict[tuple[str, int], list[Binding]] = {}
    for binding in group.bindings:
        found.setdefault((binding.name, binding.dim), []).append(binding)
    return found


def _resize(layer: nn.Module, binding: Binding, cut: Tensor) -> None:
    """What the layer says of its own size."""
    size = cut.shape[binding.dim]
    if isinstance(layer, nn.Embedding):
        names: tuple[str, ...] = ("embedding_dim",)
    elif _is_depthwise(layer):
        names = ("in_channels", "out_channels", "groups")
    elif isinstance(layer, _BatchNorm):
        names = ("num_features",)
    else:
        inputs = _reads(layer, binding) or (is_transposed(layer) and binding.dim == 0 and cut.ndim > 1)
        names = INPUTS if inputs else OUTPUTS
    for name in names:
        if hasattr(layer, name):
            setattr(layer, name, size)


def _count_heads(module: nn.Module, group: Group, kept: Tensor) -> None:
    """The nearest module above that says how many heads there are."""
    path = group.name.removesuffix(" heads")
    while path:
        path = path.rpartition(".")[0]
        holder = module.get_submodule(path)
        if isinstance(holder, nn.MultiheadAttention):
            take_heads(holder, kept)
            return
        names = [name for name in NUM_HEADS if getattr(holder, name, None) == group.size]
        for name in names:
            setattr(holder, name, len(kept))
        if names:
            return


@torch.no_grad()
def _outputs(module: nn.Module, inputs: Any) -> list[Tensor]:
    """In eval mode, with the modes given back."""
    modes = {one: one.training for one in module.modules()}
    module.eval()
    try:
        found = module(*inputs) if isinstance(inputs, tuple) else module(inputs)
    finally:
        for one, mode in modes.items():
            one.training = mode
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _is_same(module: nn.Module, inputs: Any, expected: list[Tensor]) -> bool:
    try:
        found = _outputs(module, inputs)
    except Exception:  # the user's own code, with other sizes
        return False
    return len(found) == len(expected) and all(
        one.shape == other.shape and bool((one - other).abs().max() <= TOLERANCE * other.abs().max())
        for one, other in zip(found, expected, strict=True)
        if other.numel()
    )
