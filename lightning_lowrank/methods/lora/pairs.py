"""LoRA pairs on layers: their places, their products, and how they are added to the weight.

Shape letters:  B any batch axes   M outputs, N inputs of a layer   R rank of a pair
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from einops import rearrange
from jaxtyping import Num
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_lowrank.models.fused import Fused
from lightning_lowrank.models.names import tag

# How a layer reads its weight: "direct" by whoever wants it, without a call of the layer.
Kind = Literal["linear", "transposed", "embedding", "convolution", "direct"]
# Of the adapter that peft injects.
ADAPTER = "default"
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Recipe:
    """Description of the pairs of a layer, in its attribute `lora`.

    Attributes:
        kind: How the layer uses its weight.
        rank: Rank of each pair.
        scaling: Factor of the products: alpha over the rank, or over its square root.
        dropout: Share of inputs that the pairs drop in training.
        parts: Names and numbers of outputs of the parts that have one pair each; a single part without a name unless
            the layer is fused.
        by_peft: Whether the layer is one of peft's, around the original one.
    """

    kind: Kind
    rank: int
    scaling: float
    dropout: float
    parts: tuple[tuple[str, int], ...]
    by_peft: bool = False

    @property
    def names(self) -> tuple[str, str]:
        """Attributes with the first and second factors, named as in peft."""
        middle = "embedding_" if self.kind == "embedding" else ""
        return f"lora_{middle}A", f"lora_{middle}B"

    @property
    def is_transposed(self) -> bool:
        """Whether the weight has its inputs as rows."""
        return self.kind in ("transposed", "embedding")


class LowRankSum(nn.Module):
    """Parametrization of a weight that is used without calling its layer: the weight plus the product.

    Attributes:
        order: Names of the layer's parameters.
    """

    lora: Recipe
    order: tuple[str, ...]

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, in the weight's own dtype."""
        return weight + as_weight(change(self), self.lora, weight.shape).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class Place:
    """A weight with its pairs.

    Attributes:
        name: Clean name of the weight.
        key: Key of the weight in the state dict.
        path: Path of the module that holds the factors.
        holder: That module: the layer, or the parametrization of its weight.
        layer: The layer.
        weight: The parameter that the optimizer would step without pairs.
    """

    name: str
    key: str
    path: str
    holder: nn.Module
    layer: nn.Module
    weight: nn.Parameter

    @property
    def recipe(self) -> Recipe:
        """Recipe of the pairs."""
        return cast(Recipe, self.holder.lora)

    @property
    def local(self) -> str:
        """Name of the weight in the layer."""
        return self.name.rpartition(".")[2]

    @property
    def original_key(self) -> str:
        """Key of the weight in a state dict without pairs."""
        return self.moved.get(self.key, self.key.replace(f"parametrizations.{self.local}.original", self.local))

    @property
    def moved(self) -> dict[str, str]:
        """Maps keys inside of a layer that peft has wrapped to the original keys."""
        if not self.recipe.by_peft:
            return {}
        inner = cast(nn.Module, self.holder.base_layer).state_dict()
        return {f"{self.path}.base_layer.{name}": f"{self.path}.{name}" for name in inner}

    @property
    def factor_keys(self) -> list[str]:
        """Keys of the factors in the state dict."""
        first, second = self.recipe.names
        if self.recipe.by_peft:
            if gains(self.holder):
                return [f"{self.path}.{name}.{ADAPTER}" for name in (first, second, "lora_E", "ranknum")]
            end = "" if self.recipe.kind == "embedding" else ".weight"
            return [f"{self.path}.{name}.{ADAPTER}{end}" for name in (first, second)]
        ends = [f".{part}" if part else "" for part, _ in self.recipe.parts]
        return [f"{self.path}.{name}{end}".lstrip(".") for end in ends for name in (first, second)]

    def matrix(self) -> Num[Tensor, "M N"]:
        """The weight as outputs by inputs, with the rows of a part together, in a precision for computing."""
        weight = wide(self.weight.detach())
        whole = (weight.mT if self.recipe.is_transposed else weight).flatten(1)
        order = getattr(self.holder, "lora_order", None)
        return whole if order is None else whole[order.argsort()]

    @torch.no_grad()
    def add(self, sign: int = 1) -> None:
        """Add the products of the pairs to the weight, or subtract them."""
        delta = as_weight(change(self.holder), self.recipe, self.weight.shape)
        self.weight.copy_(wide(self.weight).add(delta, alpha=sign))


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def factors(holder: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Both factors of each pair, by part."""
    recipe = cast(Recipe, holder.lora)
    first, second = (getattr(holder, name) for name in recipe.names)
    if recipe.by_peft:
        a, b = (getattr(held[ADAPTER], "weight", held[ADAPTER]) for held in (first, second))
        return {"": (a, b)}
    if isinstance(first, nn.ParameterDict):
        return {part: (first[part], second[part]) for part, _ in recipe.parts}
    return {"": (first, second)}


def gains(holder: nn.Module) -> list[nn.Parameter]:
    """The numbers between the two factors of AdaLoRA's only pair, one for each direction."""
    between: Any = getattr(holder, "lora_E", None)
    return [] if between is None else [between[ADAPTER]]


def learned(holder: nn.Module) -> list[nn.Parameter]:
    """All trained parameters of the pairs of a weight."""
    return [*(p for pair in factors(holder).values() for p in pair), *gains(holder)]


def products(holder: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors in the form in which they are multiplied, by part."""
    found: dict[str, tuple[Tensor, Tensor]] = {**factors(holder)}
    for gain in gains(holder):
        found = {part: (a * gain, b) for part, (a, b) in found.items()}
    return found


def change(holder: nn.Module) -> Num[Tensor, "M N"]:
    """The change of a weight by its pairs, as outputs by inputs."""
    pieces = [wide(b) @ wide(a).flatten(1) for a, b in products(holder).values()]
    order = getattr(holder, "lora_order", None)
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return (whole if order is None else whole[order]) * cast(Recipe, holder.lora).scaling


def as_weight(delta: Num[Tensor, "M N"], recipe: Recipe, shape: torch.Size) -> Tensor:
    """A matrix of outputs by inputs in the shape of the weight."""
    return (delta.mT if recipe.is_transposed else delta).reshape(shape)


def add_branch(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
    """The output of a layer plus that of its pairs; no gradient of the weight is formed.

    It is a hook of the layer and a plain function, so that a copy of the layer has it, too.
    """
    recipe = cast(Recipe, layer.lora)
    x = args[0] if args else next(iter(kwargs.values()))
    if layer.lora_waits and in_training(layer):
        take_inputs(layer, x)
    pairs = list(factors(layer).values())
    if recipe.kind != "embedding":
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(pairs[0][0].dtype)
        if recipe.dropout:
            x = F.dropout(x, recipe.dropout, layer.training)
    pieces = [_through(layer, recipe, x, a, b) for a, b in pairs]
    if len(pieces) == 1:
        return output + pieces[0].to(output.dtype)
    order = getattr(layer, "lora_order", None)
    whole = torch.cat(pieces, -1)
    return output + (whole if order is None else whole[..., order]).to(output.dtype)


def _through(layer: nn.Module, recipe: Recipe, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """An input through one pair; the scaling acts where it is narrow."""
    if recipe.kind == "convolution":
        inner = layer._conv_forward(x, a, None)  # type: ignore[operator]
        places = a.ndim - 2
        return CONVOLUTIONS[places](_scaled(inner, recipe), b.reshape(*b.shape, *[1] * places))
    if recipe.kind == "embedding":
        inner = F.embedding(x, a.mT, cast(nn.Embedding, layer).padding_idx)
    else:
        inner = F.linear(x, a)
    return F.linear(_scaled(inner, recipe), b)


def _scaled(inner: Tensor, recipe: Recipe) -> Tensor:
    return inner if recipe.scaling == 1 else inner * recipe.scaling


def in_training(layer: nn.Module) -> bool:
    """Whether a training step calls the layer: with gradients, or in training mode. Lightning leaves modules in
    evaluation mode as they are, and Hugging Face's pretrained ones come in this mode.
    """
    return layer.training or torch.is_grad_enabled()


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def take_inputs(layer: nn.Module, x: Tensor) -> None:
    """EVA: set the first factors to the top right singular vectors of the first inputs in training, of all processes.

    The second factors are zero until the first step, so the outputs do not change.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows = wide(x.detach()).flatten(0, -2)
        gram = rows.mT @ rows
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(gram)
        _, vectors = torch.linalg.eigh(gram)
    for a, _ in factors(layer).values():
        a.copy_(vectors.mT.flip(0)[: len(a)])
    layer.lora_waits = False  # type: ignore[assignment]


def parts_of(read: Fused | None, is_packed: bool, rows: int) -> tuple[tuple[tuple[str, int], ...], Tensor | None]:
    """Parts of the outputs of a layer with their sizes, and the place of each output among them. The place is None if
    the parts follow one another.

    Args:
        read: How a fused projection is read; None for other layers.
        is_packed: Whether it is the packed projection of `nn.MultiheadAttention`.
        rows: Number of outputs of the layer.
    """
    if is_packed:
        return tuple((part, rows // 3) for part in "qkv"), None
    if read is None:
        return (("", rows),), None
    found = read.pattern(heads=False)
    if found is not None:
        sizes = {read.parts: len(read.parts), **found[1]}
        lying = rearrange(torch.arange(rows), found[0], **sizes).reshape(len(read.parts), -1)
        order = lying.flatten().argsort()
        parts = tuple((part, lying.shape[1]) for part in read.parts)
        return parts, None if torch.equal(order, torch.arange(rows)) else order
    if read.order.startswith("qkv"):
        queries = read.width(rows)
        return (("q", queries), ("k", (rows - queries) // 2), ("v", (rows - queries) // 2)), None
    return (("", rows),), None


def attach(layer: nn.Module, local: str, recipe: Recipe, order: Tensor | None) -> nn.Module:
    """Give a layer pairs whose factors are zero; returns the module that holds them."""
    weight = getattr(layer, local)
    holder = LowRankSum() if recipe.kind == "direct" else layer
    dtype = torch.promote_types(weight.dtype, torch.float32)
    options = {"dtype": dtype, "device": weight.device}
    inner = tuple(weight.shape[1:]) if recipe.kind == "convolution" else (_num_inputs(weight, recipe),)
    shapes = {part: ((recipe.rank, *inner), (rows, recipe.rank)) for part, rows in recipe.parts}
    for i, name in enumerate(recipe.names):
        made = {part: nn.Parameter(torch.zeros(pair[i], **options)) for part, pair in shapes.items()}
        setattr(holder, name, made[""] if "" in made else nn.ParameterDict(made))
    if order is not None:
        holder.register_buffer("lora_order", order.to(weight.device), persistent=False)
    holder.lora, holder.lora_waits = recipe, False  # type: ignore[assignment]
    if isinstance(holder, LowRankSum):
        holder.order = tuple(layer._parameters)
        parametrize.register_parametrization(layer, local, holder)
    else:
        layer.register_forward_hook(add_branch, with_kwargs=True)
    return holder


def share(layer: nn.Module, holder: nn.Module) -> None:
    """Give a layer the pairs of another one that has the same weight."""
    for name in (*cast(Recipe, holder.lora).names, "lora", "lora_waits"):
        setattr(layer, name, getattr(holder, name))
    layer.register_forward_hook(add_branch, with_kwargs=True)


def detach(place: Place) -> None:
    """Remove the pairs of a layer; their products are lost."""
    if place.recipe.kind == "direct":
        flag = place.weight.requires_grad
        parametrize.remove_parametrizations(place.layer, place.local, leave_parametrized=False)
        getattr(place.layer, place.local).requires_grad_(flag)
        known, order = place.layer._parameters, cast(LowRankSum, place.holder).order
        place.layer._parameters = {name: known[name] for name in (*order, *known) if name in known}
        return
    hooks = place.layer._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is add_branch]:
        del hooks[key]
        place.layer._forward_hooks_with_kwargs.pop(key, None)
    for name in (*place.recipe.names, "lora_order", "lora_waits", "lora"):
        if name in place.layer.__dict__ or hasattr(place.layer, name):
            delattr(place.layer, name)


def places(module: nn.Module, *, all_names: bool = False) -> list[Place]:
    """The weights of a module that have pairs.

    Args:
        all_names: Return a layer under each of its names, and a shared weight in each of its layers.
    """
    found: dict[Any, Place] = {}
    for place in _places(module):
        found.setdefault(place.key if all_names else id(place.weight), place)
    return list(found.values())


def _places(module: nn.Module) -> Iterator[Place]:
    for path, layer in module.named_modules(remove_duplicate=False):
        dot = "." if path else ""
        if isinstance(layer.__dict__.get("lora"), Recipe) and not isinstance(layer, LowRankSum):
            inner = "base_layer." if layer.lora.by_peft else ""
            yield Place(tag(f"{path}{dot}weight"), f"{path}{dot}{inner}weight", path, layer, layer, layer.weight)
        for local, chain in getattr(layer, "parametrizations", {}).items():
            for i, holder in enumerate(chain):
                if isinstance(holder, LowRankSum):
                    within = f"{path}{dot}parametrizations.{local}"
                    name, key = tag(f"{path}{dot}{local}"), f"{within}.original"
                    yield Place(name, key, f"{within}.{i}", holder, layer, chain.original)


def _num_inputs(weight: Tensor, recipe: Recipe) -> int:
    return weight.shape[0] if recipe.is_transposed else weight[0].numel()
