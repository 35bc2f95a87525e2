"""Which weights LoRA adapts, which other parameters train, and which are frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lowrank.methods.lora.pairs import Kind, Recipe, parts_of
from lightning_lowrank.methods.matrices import (
    EMBEDDINGS,
    Owner,
    Patterns,
    is_matrix,
    matrices,
    owners_of,
    sides,
    unusual,
)
from lightning_lowrank.models.axes import is_transposed
from lightning_lowrank.models.effective_weights import hooked
from lightning_lowrank.models.fused import fused
from lightning_lowrank.models.names import chosen_parameters, fitting, tag

Ranks = int | Mapping[str, int]
CONVOLVING = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


@dataclass(frozen=True)
class Settings:
    """Options of LoRA.

    Attributes:
        ranks: Patterns with their ranks. None as a pattern means all that `match` chooses.
        alpha: None means the rank.
        init: Initial value of the pairs.
        match: Patterns of weights to adapt.
        exclude: Patterns of weights to leave out.
        train_also: Patterns of parameters to train in full.
        rslora: Whether the scaling is alpha over the square root of the rank.
        dropout: Share of the inputs of pairs that is dropped.
        seed: Seed for random factors.
        backend: Which package creates the pairs.
        is_allocated: Whether they belong to AdaLoRA, whose ranks change.
    """

    ranks: tuple[tuple[str | None, int], ...]
    alpha: int | float | None
    init: str
    match: tuple[str, ...] | None
    exclude: tuple[str, ...] | None
    train_also: tuple[str, ...]
    rslora: bool
    dropout: float
    seed: int
    backend: str = "parametrize"
    is_allocated: bool = False

    @property
    def by_peft(self) -> bool:
        """Whether peft wraps the layers."""
        return self.backend == "peft"

    def scaling(self, rank: int) -> float:
        """Factor of the product of a pair."""
        alpha = rank if self.alpha is None else self.alpha
        if self.is_allocated:  # as peft has it
            return float(alpha / (rank + 1e-5))
        return float(alpha / rank**0.5 if self.rslora else alpha / rank)


@dataclass(frozen=True)
class Chosen:
    """A weight to adapt.

    Attributes:
        name: Its tag.
        owners: Layers that have it; several if it is shared.
        recipe: Recipe of its pairs.
        order: Places of the outputs of its parts; None if the parts follow one another.
    """

    name: str
    owners: Sequence[Owner]
    recipe: Recipe
    order: Tensor | None


@dataclass(frozen=True)
class Choice:
    """The result of choosing weights in a module.

    Attributes:
        adapted: Weights that get pairs.
        trained: Names of parameters that train in full.
        left_out: Tags of matrices that are left alone, each with the reason.
        head: Name of the head's weight, if there is one.
    """

    adapted: Sequence[Chosen]
    trained: frozenset[str]
    left_out: Mapping[str, str] = field(default_factory=dict)
    head: str | None = None


def chosen(module: nn.Module, settings: Settings) -> Choice:
    """Choose which weights are adapted and which parameters train in full, and say why others are left alone.

    Raises:
        ValueError: A pattern matches nothing or a weight that cannot be adapted, or a rank is larger than that of a
            matrix.
    """
    refuse_adapted(module)
    _refuse_quantised(module, settings.match)
    owners, layers = owners_of(module), dict(module.named_modules())
    explicit = settings.match is not None or settings.ranks[0][0] is not None
    patterns = settings.match or [pattern for pattern, _ in settings.ranks if pattern is not None] or None
    found = matrices(module, patterns, settings.exclude)
    names = {id(p): name for name, p in module.named_parameters()}
    head, why_frozen = _head(module, owners, names)
    kinds = {name: _kind(owners[id(p)], layers) for name, p in found.matrices.items()}
    left_out = dict(found.left_out)
    for name, (kind, trouble) in kinds.items():
        if settings.init in ("eva", "corda") and kind not in (None, "linear", "transposed"):
            kinds[name] = (kind, trouble) = None, f"init={settings.init!r} needs the inputs of linear layers"
        if settings.by_peft and kind is not None:
            why = _not_by_peft(kind, owners[id(found.matrices[name])], module, settings)
            kinds[name] = (kind, trouble) = (None, why) if why else (kind, trouble)
        if explicit and kind is None:
            raise ValueError(
                f"LoRA cannot adapt {name!r}: {trouble}; exclude it with exclude={name!r}, or change match"
            )
        if not explicit and trouble:
            left_out[name] = trouble
    ranks = _ranks(module, settings, list(found.matrices))
    adapted = []
    for name, parameter in found.matrices.items():
        kind = kinds[name][0]
        if name not in left_out and kind is not None:
            adapted.append(_chosen(name, parameter, owners[id(parameter)], kind, ranks[name], settings, layers))
    if not adapted:
        raise ValueError(f"LoRA: there is nothing to adapt; left out: {left_out}. Name the weights in match")
    trained = _trained(module, settings, {id(found.matrices[one.name]) for one in adapted}, head, why_frozen)
    if head is not None and why_frozen:
        left_out[tag(head)] = why_frozen
    elif head is not None and head in trained:
        left_out.pop(tag(head), None)
    return Choice(adapted, trained, left_out, head)


def refuse_adapted(module: nn.Module) -> None:
    """Refuse a module that has other adapters.

    Raises:
        ValueError: It has one.
    """
    strange = next((name for name, _ in module.named_parameters() if "lora_" in name), None)
    if strange is not None:
        raise ValueError(f"LoRA: the module already has an adapter, {strange!r}; merge it first")


def _kind(owners: Sequence[Owner], layers: Mapping[str, nn.Module]) -> tuple[Kind | None, str]:
    """How a weight is read, None if it cannot be adapted; and why it is not adapted unless it is matched."""
    kinds = [_kind_of(owner, layers) for owner in owners]
    if len({kind for kind, _ in kinds}) > 1 or (len(kinds) > 1 and kinds[0][0] == "direct"):
        where = [owner.path for owner in owners]
        return None, f"layers that use it in different ways share it: {where}"
    return kinds[0]


def _kind_of(owner: Owner, layers: Mapping[str, nn.Module]) -> tuple[Kind | None, str]:
    layer, name = owner.layer, type(owner.layer).__name__
    if isinstance(layer, ParametrizationList) or hooked(layer):
        return None, "a parametrization, a norm or a mask computes it"
    if isinstance(layer, nn.RNNBase):
        return None, f"{name} stores its weights in one block of memory"
    holder = layers.get(owner.path.rpartition(".")[0])
    attends = isinstance(layer, nn.MultiheadAttention)
    if attends or (isinstance(holder, nn.MultiheadAttention) and layer is holder.out_proj):
        return "direct", ""
    if owner.local == "weight":
        forward = type(layer).forward
        if forward is nn.Linear.forward:
            return "linear", ""
        if is_transposed(layer):
            return "transposed", ""
        if forward is nn.Embedding.forward:
            return "embedding", "embedding"
        if forward in CONVOLVING and layer.groups == 1:
            return "convolution", ""
    return "direct", f"{name} uses it without calling the layer; to adapt it, name it in match"


def _not_by_peft(kind: Kind, owners: Sequence[Owner], module: nn.Module, settings: Settings) -> str:
    """Why peft cannot adapt a weight here, if it cannot."""
    first, instead = owners[0], "LoRA" if settings.is_allocated else "backend='parametrize'"
    if settings.is_allocated and kind not in ("linear", "transposed"):
        return "AdaLoRA adapts linear layers only"
    if kind not in ("linear", "transposed") and (kind, settings.init) != ("embedding", "default"):
        return f"backend='peft' with init={settings.init!r} adapts linear layers only (with 'default', embeddings too)"
    paths = [path for path, layer in module.named_modules(remove_duplicate=False) if layer is first.layer]
    if len(paths) > 1 or len(owners) > 1:
        return f"several layers share it, {[*paths, *(owner.path for owner in owners[1:])]}; use {instead}"
    if not first.path:
        return "it is the module itself, which peft cannot wrap"
    if kind == "transposed" and settings.init in ("olora", "orthogonal"):
        return f"peft's init={settings.init!r} treats Conv1D as transposed; use backend='parametrize'"
    if settings.init != "default" and first.layer.weight.dtype == torch.float64:
        return f"peft has no init={settings.init!r} in float64; use backend='parametrize'"
    return ""


def _chosen(
    name: str,
    parameter: nn.Parameter,
    owners: Sequence[Owner],
    kind: Kind,
    rank: int,
    settings: Settings,
    layers: Mapping[str, nn.Module],
) -> Chosen:
    first = owners[0]
    rows, columns = sides(parameter)
    if kind in ("transposed", "embedding"):
        rows, columns = columns, rows
    packed = isinstance(first.layer, nn.MultiheadAttention) and first.local == "in_proj_weight"
    read = fused(first.path, layers) if kind in ("linear", "transposed") and not settings.by_peft else None
    parts, order = parts_of(read, packed, rows)
    if rank > min(columns, *(size for _, size in parts)):
        shape = f"{len(parts)} times {parts[0][1]} x {columns}" if len(parts) > 1 else f"{rows} x {columns}"
        raise ValueError(
            f"LoRA: r={rank} is larger than the largest rank of {name!r} ({shape}); give exclude={name!r}, or ranks "
            "by pattern"
        )
    if settings.dropout and kind in ("direct", "embedding"):
        raise ValueError(
            f"LoRA(dropout={settings.dropout}): dropout needs inputs, and {name!r} is used without calling the "
            "layer; exclude it"
        )
    recipe = Recipe(kind, rank, settings.scaling(rank), settings.dropout, parts, settings.by_peft)
    return Chosen(name, owners, recipe, order)


def _ranks(module: nn.Module, settings: Settings, names: Sequence[str]) -> dict[str, int]:
    """By tag; of several patterns that fit, the first counts."""
    ranks: dict[str, int] = {}
    for pattern, rank in settings.ranks:
        fit = names if pattern is None else chosen_parameters(module, pattern, None)
        ranks = dict.fromkeys(fit, rank) | ranks
    return ranks


def _head(module: nn.Module, owners: Mapping[int, Sequence[Owner]], names: Mapping[int, str]) -> tuple[str | None, str]:
    """The last linear layer, and why it is no task head of its own: one that gives tokens is as old as the rest."""
    found = {tag(name): p for name, p in module.named_parameters() if is_matrix(p)}
    tags = [name for name, why in (unusual(module, found) if found else {}).items() if why == "head"]
    if not tags:
        return None, ""
    weight = found[tags[0]]
    tables = [layer for layer in module.modules() if isinstance(layer, EMBEDDINGS)]
    if any(len(layer.weight) == len(weight) for layer in tables) or len(owners[id(weight)]) > 1:
        return names[id(weight)], "head over tokens; to train it, name it in train_also or match"
    return names[id(weight)], ""


def _trained(
    module: nn.Module, settings: Settings, adapted: set[int], head: str | None, why_frozen: str
) -> frozenset[str]:
    """Names of parameters that train whole: those that `train_also` fits, and the head unless the user froze it."""
    named = dict(module.named_parameters())
    layers = {name: module.get_submodule(name.rpartition(".")[0]) for name in named}
    also = fitting("train_also", list(settings.train_also), layers) if settings.train_also else set()
    everything = "*" in settings.train_also
    if everything:
        also = {name for name in also if named[name].requires_grad}
    double = [name for name in also if id(named[name]) in adapted]
    if double and not everything:
        raise ValueError(
            f"LoRA(train_also=...) matches {double[0]!r}, which is adapted; exclude it, or remove it from train_also"
        )
    if head is not None and not why_frozen and id(named[head]) not in adapted:
        beside = head.rpartition(".")[0]
        also |= {name for name, p in named.items() if name.rpartition(".")[0] == beside and p.requires_grad}
    return frozenset(name for name in also if id(named[name]) not in adapted and _may_train(named[name]))


def _may_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _refuse_quantised(module: nn.Module, match: Patterns) -> None:
    """Weights of whole numbers are those of quantised layers.

    Raises:
        ValueError: One is meant.
    """
    named: dict[str, Any] = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(weight := getattr(layer, "weight", None), torch.Tensor)
        and not weight.is_floating_point()
        and not weight.is_complex()
    }
    meant = named if match is None else {f"{name}.weight": layer for name, layer in named.items()}
    if not meant:
        return
    everything = {name: module.get_submodule(name.rpartition(".")[0]) for name, _ in module.named_parameters()}
    hits = set(meant) if match is None else fitting("match", match, everything | meant) & set(meant)
    if hits:
        raise ValueError(
            f"LoRA: {min(hits)!r} is quantised, so changes cannot be merged into it; match other weights, or use "
            "peft directly"
        )
