"""Attentions, and where the queries and keys of each of their heads are in the weights.

Shape letters:  H heads of the part in question   D columns that a head compares   N inputs of the layer
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lowrank.models.axes import is_transposed
from lightning_lowrank.models.effective_weights import Parametrized, hooked
from lightning_lowrank.models.fused import AROUND, NUM_BLOCKS, NUM_HEADS, NUM_KEY_HEADS, fused, number
from lightning_lowrank.models.names import fitting, tags
from lightning_lowrank.models.units import ALL_THREE, num_heads

# Layers of queries or of keys alone, by the last part of their names; what is around the word is the same in both.
ALONE = re.compile(r"(?P<before>(?:(?:to|w)_?)?)(?P<part>query|key|q|k)(?P<after>(?:_?proj|_?lin|_?attn|s)?)", re.I)
OF_TORCH = {"in_proj_weight": "qkv heads d", "q_proj_weight": "q heads d", "k_proj_weight": "k heads d"}
# Attributes that say how many columns of a head are compared.
WIDTHS = ("head_dim", "head_size", "attention_head_size", "d_head", "key_value_proj_dim")
# The axis of queries, keys and values: some of these letters, each once.
PARTS = re.compile(r"(?!.*(.).*\1)[qkv]+")


@dataclass(frozen=True)
class Projection:
    """Queries, or keys, in a weight.

    Attributes:
        weight: Its name.
        layer: It is of.
        part: "q" or "k".
        order: Axes of what the layer puts out, the slowest first: "qkv heads d", "heads qkv d", "q heads d".
        heads: Of queries.
        key_heads: Of keys and of values.
    """

    weight: str
    layer: nn.Module
    part: str
    order: str
    heads: int
    key_heads: int

    @property
    def parameter(self) -> nn.Parameter:
        """The weight, or the largest parameter that it is computed from."""
        return _original(self.layer, self.weight.rpartition(".")[2])

    def __call__(self, weight: Shaped[Tensor, "_ _"]) -> Shaped[Tensor, "H D N"]:
        """The part of each head, of a tensor of the weight's shape."""
        rows = weight.mT if is_transposed(self.layer) else weight
        parts = _parts(self.order)
        if "q" in parts and len(parts) > 1 and self.heads != self.key_heads:
            counts = [self.heads if part == "q" else self.key_heads for part in parts]
            each = len(rows) // sum(counts)
            own: Tensor = rows.split([count * each for count in counts])[parts.index(self.part)]
            return own.reshape(-1, each, own.shape[-1])
        heads = self.heads if "q" in parts else self.key_heads
        rest = " ".join(axis for axis in self.order.split() if axis not in (parts, "d"))
        sizes = {"blocks": NUM_BLOCKS, "heads": heads // NUM_BLOCKS} if "blocks" in rest else {"heads": heads}
        order = " ".join("parts" if axis == parts else axis for axis in self.order.split())
        split: Tensor = rearrange(rows, f"({order}) n -> parts ({rest}) d n", parts=len(parts), **sizes)
        return split[parts.index(self.part)]


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        name: Tag of the module.
        path: Of the module that compares queries with keys: what it calls in its forward pass is of this attention.
        queries: In the weight that they come from.
        keys: The same; those of a head of keys are compared with several heads of queries where there are fewer.
    """

    name: str
    path: str
    queries: Projection
    keys: Projection

    @property
    def heads(self) -> int:
        """Number of heads of queries."""
        return self.queries.heads

    @property
    def trained(self) -> bool:
        """Whether a step can change what it compares."""
        return self.queries.parameter.requires_grad or self.keys.parameter.requires_grad

    @property
    def labels(self) -> list[str]:
        """One for each head."""
        return [".".join(filter(None, (self.name, f"h{head}"))) for head in range(self.heads)]


@dataclass(frozen=True)
class _Weight:
    """A weight from which queries, keys or both come.

    Attributes:
        holder: Path of the module around the layer.
        local: Its own name there.
        asked: The user has named it.
    """

    name: str
    layer: nn.Module
    holder: str
    local: str
    order: str
    rows: int
    asked: bool

    @property
    def parts(self) -> str:
        return _parts(self.order)

    @property
    def stem(self) -> tuple[str, ...]:
        """What is around the word in its name."""
        found = ALONE.fullmatch(self.local)
        return (found["before"].lower(), found["after"].lower(), str(len(found["part"]) > 1)) if found else ()


@dataclass
class Finder:
    """Looks for attentions whose queries and keys can be told.

    Args:
        module: Anything with `nn.MultiheadAttention`, fused layers of classes that are known, or layers whose names say
            that they make queries and keys.
        layouts: By patterns of names of weights the axes of what comes out: "qkv heads d", "q heads d".
        heads: Numbers of heads of queries, by patterns of names of weights.

    Attributes:
        untold: Weights of which queries and keys cannot be told, with the reason.

    Raises:
        ValueError: A pattern matches nothing, or a layout is none.
    """

    module: nn.Module
    layouts: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = dict(self.module.named_modules())
        self.untold: dict[str, str] = {}
        for layout in self.layouts.values():
            _refuse_layout(layout)
        self._told = {name: x for p, x in self.layouts.items() for name in fitting("layouts", p, self.weights)}
        self._counted = {name: x for p, x in self.heads.items() for name in fitting("heads", p, self.weights)}

    def found(self) -> list[Attention]:
        """All of them, in the order of the module.

        Raises:
            ValueError: What the user has named does not divide, or has no partner.
        """
        by_holder: dict[str, list[_Weight]] = {}
        for name, layer in self.weights.items():
            if (weight := self._read(name, layer)) is not None:
                by_holder.setdefault(weight.holder, []).append(weight)
        names = tags(self.modules)
        attentions = []
        for holder, weights in by_holder.items():
            pairs = list(self._pairs(weights))
            for queries, keys in pairs:
                name = ".".join(filter(None, (names[holder], queries.local if len(pairs) > 1 or not holder else "")))
                attentions += self._attempt(name, queries, keys)
        return attentions

    @cached_property
    def weights(self) -> dict[str, nn.Module]:
        """The layers of all matrices, by the names that the layers know them by."""
        return {
            ".".join(filter(None, (path, local))): layer
            for path, layer in self.modules.items()
            if ".parametrizations." not in f".{path}."
            for local in _matrices(layer)
        }

    def _read(self, name: str, layer: nn.Module) -> _Weight | None:
        """How a weight is read, None where it has neither queries nor keys, or they cannot be told."""
        path, _, local = name.rpartition(".")
        above = path.split(".")
        while above[-1] in AROUND:
            above.pop()
        inside = not isinstance(layer, nn.Linear) and not is_transposed(layer)
        holder, own = (path, local) if inside else (".".join(above[:-1]), above[-1])
        order = self._told.get(name) or (OF_TORCH.get(local, "") if isinstance(layer, nn.MultiheadAttention) else "")
        if not order and not inside and local == "weight":
            order = self._order(name, path, own)
        if not order or _parts(order) == "v":
            return None
        if any(
            "lora_" in parameter for parameter, _ in self.modules[".".join(above)].named_parameters(recurse=not inside)
        ):
            self.untold[name] = "an adapter is added to it"
            return None
        shape = _shape(layer, local)
        if len(shape) != 2:
            return None
        rows = shape[1 if is_transposed(layer) else 0]
        return _Weight(name, layer, holder, own, order, rows, name in self._told or name in self._counted)

    def _order(self, name: str, path: str, own: str) -> str:
        """As its class, or its name says."""
        read, alone = fused(path, self.modules), ALONE.fullmatch(own)
        if read is None and ALL_THREE.fullmatch(own):
            self.untold[name] = "their order is unknown, since its class is not a known one"
        return read.order if read is not None else f"{alone['part'][0].lower()} heads d" if alone else ""

    def _pairs(self, weights: Sequence[_Weight]) -> Iterator[tuple[_Weight, _Weight]]:
        """Queries and keys of one module."""
        yield from ((one, one) for one in weights if {"q", "k"} <= set(one.parts))
        keys = [one for one in weights if "k" in one.parts and "q" not in one.parts]
        for queries in (one for one in weights if "q" in one.parts and "k" not in one.parts):
            partners = [one for one in keys if one.stem == queries.stem and one.parts == "k"] or [
                one for one in keys if "v" in one.parts or one.asked
            ]
            if len(partners) == 1:
                yield queries, partners[0]
            else:
                self._leave_out(queries, f"it has {len(partners)} layers of keys next to it")

    def _attempt(self, name: str, queries: _Weight, keys: _Weight) -> list[Attention]:
        try:
            heads, key_heads = self._counts(queries, keys)
        except ValueError as error:
            self._leave_out(queries if queries.asked else keys, str(error))
            return []
        parts = (
            Projection(one.name, one.layer, part, one.order, heads, key_heads)
            for one, part in ((queries, "q"), (keys, "k"))
        )
        return [Attention(name, queries.holder, *parts)]

    def _counts(self, queries: _Weight, keys: _Weight) -> tuple[int, int]:
        """Heads of queries and of keys.

        Raises:
            ValueError: They are not known, or do not divide.
        """
        holder = self.modules[queries.holder]
        path = queries.name.rpartition(".")[0]
        read, together = fused(path, self.modules), queries is keys
        share = queries.rows // len(queries.parts)
        known = (read.heads if read else 0) or number(holder, NUM_HEADS) or num_heads(queries.name, self.modules, share)
        heads = self._counted.get(queries.name) or known
        if not heads:
            raise ValueError("the number of its heads is unknown")
        if together:
            key_heads = (read.key_heads if read else 0) or number(holder, NUM_KEY_HEADS) or heads
            whole = sum(heads if part == "q" else key_heads for part in queries.parts)
            if key_heads != heads and not queries.order.startswith(f"{queries.parts} heads"):
                raise ValueError(f"{key_heads} heads of keys for {heads} of queries are combined in an unknown way")
        else:
            width = queries.rows // heads
            key_heads = max(1, keys.rows // (len(keys.parts) * max(1, width)))
            whole = heads
        self._refuse_odd(queries, keys, whole, heads, key_heads)
        return heads, key_heads

    def _refuse_odd(self, queries: _Weight, keys: _Weight, whole: int, heads: int, key_heads: int) -> None:
        width = queries.rows // whole
        if queries.rows % whole or heads % key_heads or not width:
            raise ValueError(
                f"its {queries.rows} rows do not divide into {heads} heads of queries and {key_heads} of keys"
            )
        if keys is not queries and key_heads * width * len(keys.parts) != keys.rows:
            raise ValueError(f"the {keys.rows} rows of {keys.name!r} do not divide into heads of {width} columns")
        said = number(self.modules[queries.holder], WIDTHS)
        if said and said != width and not queries.asked:
            raise ValueError(f"the width of its heads is {width} columns by their number, but {said} by its class")
        if "blocks" in queries.order and heads % NUM_BLOCKS:
            raise ValueError(f"{heads} heads do not divide into {NUM_BLOCKS} blocks")

    def _leave_out(self, weight: _Weight, reason: str) -> None:
        if weight.asked:
            raise ValueError(f"queries and keys of {weight.name!r} are unknown: {reason}")
        self.untold[weight.name] = reason


def _parts(order: str) -> str:
    """The axis of queries, keys and values; empty where there is none."""
    return next((axis for axis in order.split() if PARTS.fullmatch(axis)), "")


def _refuse_layout(layout: str) -> None:
    """Of what a user gives as the axes of what comes out."""
    axes, parts = layout.split(), _parts(layout)
    others = sorted(axis for axis in axes if axis != parts)
    if not {"q", "k"} & set(parts) or others not in (["d", "heads"], ["blocks", "d", "heads"]) or axes[-1] != "d":
        known = "'qkv heads d' and 'heads qkv d', or 'q heads d' and 'k heads d' for separate layers"
        raise ValueError(f"layouts: {layout!r} is not an order of axes with the slowest first, such as {known}")


def _matrices(layer: nn.Module) -> list[str]:
    """Names that a layer knows its matrices by, computed ones too."""
    originals = hooked(layer)
    own = [name for name, p in layer._parameters.items() if p is not None and not is_lazy(p) and p.ndim == 2]
    names = dict.fromkeys(originals[name].local if name in originals else name for name in own)
    return [*names, *(name for name in getattr(layer, "parametrizations", ()) if name not in names)]


def _original(layer: nn.Module, local: str) -> nn.Parameter:
    """The weight that a layer knows by a name, or the largest parameter that it is computed from."""
    own = layer._parameters.get(local)
    if own is not None:
        return own
    computed = next((one for one in hooked(layer).values() if one.local == local), None)
    if computed is not None:
        return computed.largest
    computation: Any = layer.parametrizations
    largest: nn.Parameter = max(computation[local].parameters(), key=Tensor.numel)
    return largest


def _shape(layer: nn.Module, local: str) -> torch.Size:
    """Of the weight that a layer knows by a name."""
    computations: Any = getattr(layer, "parametrizations", {})
    return Parametrized(computations[local]).shape if local in computations else _original(layer, local).shape
