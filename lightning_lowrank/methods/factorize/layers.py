"""Layers whose weight is `A diag(s) B`: as two thin layers, or computed at each access.

Shape letters:  M rows, N columns of a weight   R rank
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Num
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_lowrank.methods.factorize.factors import Factors
from lightning_lowrank.models.names import tag

# How a layer reads its weight: "direct" by whoever wants it, without a call of the layer.
Kind = Literal["linear", "transposed", "embedding", "convolution", "direct"]
PARTS = ("A", "s", "B")
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Factorized(nn.Module):
    """A layer whose weight is `A diag(s) B`, as two thin layers. It is mixed into the class of the layer, which keeps
    everything else. Its `weight` is computed on access.
    """

    # Of the weight as it was; `attach` sets it.
    factorized_shape: torch.Size

    @property
    def factors(self) -> Factors:
        """Factors of the weight; the first has as many axes as the layer needs."""
        return Factors(*(getattr(self, f"weight_{part}") for part in PARTS))

    @property
    def weight(self) -> Tensor:
        """The product."""
        left, scale, right = self.factors
        return Factors(left, scale, right.flatten(1)).product().reshape(self.factorized_shape)

    @property
    def thin(self) -> Tensor:
        """The layer that is called first, with the scale in it, so that nothing more is kept for the backward pass."""
        _, scale, right = self.factors
        return scale.reshape(-1, *[1] * (right.ndim - 1)) * right

    def extra_repr(self) -> str:
        """That of the layer, with the rank."""
        return f"{super().extra_repr()}, rank={len(self.factors.scale)}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, type(self).__bases__, self.__dict__.copy()


class Linear(Factorized):
    """Factorized `nn.Linear`."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Call both layers."""
        return F.linear(F.linear(x, self.thin), self.factors.left, self.bias)


class Transposed(Factorized):
    """Factorized `Conv1D` of transformers, whose weight has inputs as rows."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Call both layers."""
        return F.linear(F.linear(x, self.factors.left.mT), self.thin.mT, self.bias)


class Embedding(Factorized):
    """Factorized `nn.Embedding`."""

    padding_idx: int | None

    def forward(self, x: Tensor) -> Tensor:
        """Look up, then widen."""
        return F.linear(F.embedding(x, self.factors.left, self.padding_idx), self.thin.mT)


class Convolution(Factorized):
    """Factorized `nn.Conv1d` to `nn.Conv3d`: kernels to few channels, then all channels at each place."""

    bias: Tensor | None
    _conv_forward: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Call both layers."""
        inner = self._conv_forward(x, self.thin, None)
        places = self.factors.right.ndim - 2
        left = self.factors.left
        return CONVOLUTIONS[places](inner, left.reshape(*left.shape, *[1] * places), self.bias)


CLASSES: dict[str, type[Factorized]] = {
    "linear": Linear,
    "transposed": Transposed,
    "embedding": Embedding,
    "convolution": Convolution,
}


class LowRank(nn.Module):
    """Parametrization of a weight that is used without calling its layer.

    Args:
        factors: Its initial factors.
        shape: Shape of the weight.
        order: Names of the layer's parameters.
    """

    def __init__(self, factors: Factors, shape: torch.Size, order: tuple[str, ...]) -> None:
        super().__init__()
        self._start: Factors | None = factors
        self.shape, self.order = shape, order

    def forward(self, left: Tensor, scale: Tensor, right: Tensor) -> Tensor:
        """The product."""
        return Factors(left, scale, right).product().reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> Factors:
        """torch calls this once to create the parameters."""
        if self._start is None:
            raise ValueError("a factorized weight cannot be assigned; set its factors, or densify the module first")
        start, self._start = self._start, None
        return start


@dataclass(frozen=True, eq=False)
class Place:
    """A factorized weight.

    Attributes:
        name: Clean name of the weight.
        key: Its key in a state dict of the dense module.
        prefix: Beginning of the keys of its factors in a state dict; "A", "s" and "B" or their numbers follow.
        layer: The layer that has it.
        local: Its name in the layer.
    """

    name: str
    key: str
    prefix: str
    layer: nn.Module
    local: str

    @property
    def is_thin(self) -> bool:
        """Whether two layers are called and no weight is formed."""
        return isinstance(self.layer, Factorized)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """A, s and B, in the shapes of the layer."""
        if self.is_thin:
            return cast(tuple[nn.Parameter, ...], tuple(cast(Factorized, self.layer).factors))
        kept: Any = cast(Any, self.layer).parametrizations[self.local]
        return kept.original0, kept.original1, kept.original2

    @property
    def factors(self) -> Factors:
        """A, s and B as matrices."""
        left, scale, right = self.parameters
        return Factors(left, scale, right.flatten(1))

    @property
    def keys(self) -> list[str]:
        """Keys of A, s and B in the state dict."""
        return [self.prefix + end for end in (PARTS if self.is_thin else "012")]

    def dense(self) -> Num[Tensor, "..."]:
        """The weight in its own shape."""
        weight: Tensor = getattr(self.layer, self.local)
        return weight.detach()


def keys_of(path: str, local: str, is_thin: bool) -> tuple[str, str]:
    """Key of a weight in a state dict, and the beginning of the keys of its factors."""
    dot = "." if path else ""
    middle = f"{local}_" if is_thin else f"parametrizations.{local}.original"
    return f"{path}{dot}{local}", f"{path}{dot}{middle}"


def attach(layers: list[tuple[nn.Module, str]], kind: Kind, factors: Factors) -> list[nn.Parameter]:
    """Replace a weight by factors, in one layer or in several that share it; returns the new parameters."""
    first, local = layers[0]
    weight: nn.Parameter = getattr(first, local)
    if kind == "direct":
        parametrize.register_parametrization(first, local, LowRank(factors, weight.shape, tuple(first._parameters)))
        kept: Any = first.parametrizations[local]  # type: ignore[index]
        return [kept.original0, kept.original1, kept.original2]
    left, scale, right = factors
    if kind == "convolution":
        right = right.reshape(-1, *weight.shape[1:])
    new = [nn.Parameter(t, requires_grad=weight.requires_grad) for t in (left, scale, right)]
    for layer in {id(layer): layer for layer, _ in layers}.values():
        shape, cls = weight.shape, type(layer)
        layer.__class__ = thin_class(CLASSES[kind], cls)
        layer.factorized_shape = shape  # type: ignore[assignment]
        _replace(layer, "weight", dict(zip([f"weight_{part}" for part in PARTS], new, strict=True)))
    return new


def detach(places: list[Place]) -> None:
    """Replace factors by their weight, in all layers that share it."""
    first = places[0]
    requires_grad = any(p.requires_grad for p in first.parameters)
    if not first.is_thin:
        order = cast(Any, first.layer).parametrizations[first.local][0].order
        parametrize.remove_parametrizations(first.layer, first.local)
        dense = nn.Parameter(first.dense(), requires_grad=requires_grad)
        delattr(first.layer, first.local)
        kept = first.layer._parameters | {first.local: dense}
        first.layer._parameters.clear()
        first.layer._parameters.update({name: kept[name] for name in (*order, *kept) if name in kept})
        return
    dense = nn.Parameter(first.dense(), requires_grad=requires_grad)
    for place in places:
        layer = place.layer
        layer.__class__ = type(layer).__bases__[1]
        del layer.factorized_shape
        for part in PARTS[1:]:
            del layer._parameters[f"weight_{part}"]
        _replace(layer, "weight_A", {"weight": dense})


def places(module: nn.Module, *, all_names: bool = False) -> list[Place]:
    """The factorized weights of a module.

    Args:
        all_names: Return a layer under each of its names, and a shared weight in each of its layers.
    """
    found: dict[Any, Place] = {}
    for place in _places(module):
        found.setdefault(place.key if all_names else id(place.parameters[0]), place)
    return list(found.values())


def _places(module: nn.Module) -> Iterator[Place]:
    for path, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, Factorized):
            yield _place(path, layer, "weight", True)
        for local, chain in getattr(layer, "parametrizations", {}).items():
            if isinstance(chain[0], LowRank):
                yield _place(path, layer, local, False)


def _place(path: str, layer: nn.Module, local: str, is_thin: bool) -> Place:
    key, prefix = keys_of(path, local, is_thin)
    return Place(tag(key), key, prefix, layer, local)


_MADE: dict[tuple[type, type], type[nn.Module]] = {}


def thin_class(thin: type[Factorized], cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer that is replaced by two thin ones; always the same object."""
    if (thin, cls) not in _MADE:
        _MADE[thin, cls] = type(
            f"Factorized{cls.__name__}", (thin, cls), {"__module__": cls.__module__, "__doc__": thin.__doc__}
        )
    return _MADE[thin, cls]


def _blank(thin: type[Factorized], cls: type[nn.Module]) -> nn.Module:
    """A copy in the making."""
    made = thin_class(thin, cls)
    return made.__new__(made)


def _replace(layer: nn.Module, name: str, new: dict[str, nn.Parameter]) -> None:
    """Put parameters in the place of one, in the order in which all are listed."""
    old = dict(layer._parameters)
    layer._parameters.clear()
    for key, parameter in old.items():
        layer._parameters.update(new if key == name else {key: parameter})
