"""The matrices of a module, each under one name: what users choose from, and what sources read.

Shape letters:  B any batch axes   M rows, N columns of a matrix   R rank of a LoRA pair
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count

import torch
from jaxtyping import Num
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lowrank.maths.spectra.spectrum import full_precision
from lightning_lowrank.models.effective_weights import Computation, Parametrized, Product, hooked, wide
from lightning_lowrank.models.fused import Fused, fused
from lightning_lowrank.models.names import fitting, tag
from lightning_lowrank.models.views import View, view_of

PARAMETRIZED = re.compile(r"(?P<layer>(?:.*\.)?)parametrizations\.(?P<local>[^.]+)")
FACTOR = re.compile(
    r"(?P<layer>(?:.*\.)?)lora_(?:embedding_)?(?P<letter>A|a|down)(?P<adapter>\.(?!weight$)[^.]+)?(?:\.weight)?"
)
PARTNER = {"A": "B", "a": "b", "down": "up"}


@dataclass(frozen=True, eq=False)
class Site:
    """One named place of a module and the matrices that stand there.

    Attributes:
        name: Full name of the parameter, without the prefixes of wrappers.
        parameters: What the optimizer steps: one; A and B of a LoRA pair; the originals of a parametrised weight.
        view: How the weight becomes matrices.
        labels: One per matrix: the name, with the part appended where there are several.
        shape: Of the matrices, batch axes first; of the whole ones where they are sharded.
        product: Of a LoRA pair: `(A, B) -> B A`.
        computation: Of a parametrised, normed or pruned weight: what computes it.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    view: View
    labels: tuple[str, ...]
    shape: torch.Size
    product: Product | None = None
    computation: Computation | None = None

    @property
    def linear(self) -> bool:
        """Whether the matrices are a view of one parameter, so that what changes it changes them alike."""
        return self.product is None and self.computation is None

    def values(self) -> list[Tensor]:
        """The parameters as they are now, sharded ones as this process has them."""
        return [parameter.detach() for parameter in self.parameters]

    def weight(self, *values: Tensor) -> Num[Tensor, "*B M N"]:
        """The matrices that the layer multiplies by, at whole values of the parameters; at those of now unless given.

        Of a LoRA pair their product, without its scaling factor.
        """
        values = values or tuple(self.values())
        if self.product is not None:
            with full_precision(values[0].device):
                return self.view(self.product(*map(wide, values)))
        return self.view(self.effective(*values))

    def effective(self, *values: Tensor) -> Tensor:
        """The tensor that the layer has for its weight in evaluation, likewise; not of a LoRA pair."""
        values = values or tuple(self.values())
        return values[0] if self.computation is None else self.computation(*values)

    def tangent(self, changes: Sequence[Tensor], values: Sequence[Tensor] = ()) -> Num[Tensor, "*B M N"]:
        """First-order change of the matrices by changes of the parameters, at given whole values; by default at the
        current ones.

        For a LoRA pair, it is `dB A + B dA`. For a parametrised or normed weight, it is the change of its largest
        original, if that has the weight's shape. For a pruned weight, it is the change of its original times the mask.
        """
        if self.linear:
            return self.view(changes[0].detach())
        values = values or self.values()
        with full_precision(changes[0].device):
            if self.product is not None:
                (a, b), (da, db) = map(wide, values), map(wide, changes)
                return self.view(self.product(a, db) + self.product(da, b))
            assert self.computation is not None
            return self.view(self.computation.tangent(values, changes))


def sites(
    module: nn.Module,
    *,
    match: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    min_size: int = 2,
    heads: bool = False,
    views: Mapping[str, str | View] | None = None,
) -> list[Site]:
    """The matrices of a module: for each layer those that its type implies, each tensor once, in the order of the
    module.

    Args:
        match: Keep only parameters that match one of these patterns. A pattern is a glob on the full name (`*.attn.*`),
            a regular expression to search in it (`re:attn`), or the class of the layer or one of its bases
            (`type:Linear`).
        exclude: Leave out parameters that match one of these patterns.
        min_size: Matrices with a side shorter than this are left out.
        heads: Whether to use one matrix per attention head, if the layer knows its number of heads.
        views: Patterns as above, each with a view that replaces the one implied by the layer's type; the last match
            counts.

    Raises:
        ValueError: A pattern matches nothing, or a view does not fit its tensor.
    """
    tensors = _tensors(module)
    own = _own_views(views or {}, tensors)
    viewed = [(tensor, own.get(tensor) or tensor.implied_view(heads)) for tensor in tensors]
    found = [(tensor, view) for tensor, view in viewed if view is not None]
    owners = _owners(tensor for tensor, _ in found)
    wanted = owners.keys() if match is None else fitting("match", match, owners)
    unwanted = set() if exclude is None else fitting("exclude", exclude, owners)
    taken: set[str] = set()
    return [
        tensor.site(view, taken)
        for tensor, view in found
        if not wanted.isdisjoint(tensor.names)
        and unwanted.isdisjoint(tensor.names)
        and min(view.shape(tensor.name, tensor.like.shape)[-2:]) >= min_size
    ]


@dataclass(eq=False, slots=True)
class _Tensor:
    """What may become a site: a weight with the layer that owns it.

    Attributes:
        names: The clean one, and all that PyTorch knows its parameters by.
        like: A tensor of the weight's shape.
        fused: How queries, keys and values lie in it, where it has these.
    """

    names: tuple[str, ...]
    owner: nn.Module
    parameters: tuple[nn.Parameter, ...]
    like: Tensor
    fused: Fused | None = None
    attention: nn.MultiheadAttention | None = None
    product: Product | None = None
    computation: Computation | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    def implied_view(self, heads: bool) -> View | None:
        """The view that the layer's type implies."""
        if self.product is not None:
            return _product_view(self, self.product, heads)
        return view_of(self.attention or self.owner, self.name, self.like, heads=heads, fused=self.fused)

    def site(self, view: View, taken: set[str]) -> Site:
        """The site under the first name that is not taken."""
        for name in chain([self.name], (f"{self.name}_{n}" for n in count(2))):
            labels = tuple(f"{name}.{tag(part)}" for part in view.parts) or (name,)
            if taken.isdisjoint(labels):
                break
        taken.update(labels)
        return Site(
            name,
            self.parameters,
            view,
            labels,
            view.shape(self.name, self.like.shape),
            self.product,
            self.computation,
        )


def _tensors(module: nn.Module) -> list[_Tensor]:
    """Each weight once: LoRA pairs as one, parametrised ones computed, tied ones under their first name."""
    layers = dict(module.named_modules())
    attentions = {
        id(getattr(m.out_proj, "base_layer", m.out_proj)): m
        for m in layers.values()
        if isinstance(m, nn.MultiheadAttention)
    }
    named = _named_parameters(layers)
    pairs = {name: pair for name in named if (pair := _pair(name, named, layers))}
    known = {id(pair.parameters[1]): pair for pair in pairs.values()}
    tensors = []
    for name, (parameter, owner) in named.items():
        if id(parameter) in known and name not in pairs:
            known[id(parameter)].names += (name,)
            continue
        tensor = pairs.get(name) or _of_parameter(name, owner, parameter, layers, attentions)
        known.update({id(parameter): tensor for parameter in tensor.parameters})
        tensors.append(tensor)
    return tensors


def _named_parameters(layers: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Parameter, nn.Module]]:
    """Parameters with their owners, tied ones under each name. Lazy modules have none yet."""
    return {
        f"{path}.{local}" if path else local: (parameter, layer)
        for path, layer in layers.items()
        for local, parameter in layer._parameters.items()
        if parameter is not None and not is_lazy(parameter)
    }


def _of_parameter(
    name: str,
    owner: nn.Module,
    parameter: nn.Parameter,
    layers: Mapping[str, nn.Module],
    attentions: Mapping[int, nn.MultiheadAttention],
) -> _Tensor:
    """A parameter that is a weight itself, or the weight that is computed from it."""
    if isinstance(owner, ParametrizationList) and PARAMETRIZED.match(name) and _computable(owner):
        return _parametrized(name, owner, layers, attentions)
    path, _, local = name.rpartition(".")
    read, attention = fused(path, layers), attentions.get(id(owner))
    found = hooked(owner).get(local)
    if found is None:
        return _Tensor((tag(name), name), owner, (parameter,), parameter, read, attention)
    ends = [found.local, *found.originals]
    used, *names = [f"{path}.{end}" if path else end for end in ends]
    like = torch.empty(found.shape, device="meta")
    originals = tuple(found.originals.values())
    return _Tensor((tag(used), *names), owner, originals, like, read, attention, computation=found)


def _computable(owner: ParametrizationList) -> bool:
    """Whether the weight can be computed outside of training; else its originals are read as any parameter."""
    try:
        Parametrized(owner).shape  # noqa: B018
    except Exception:  # it is the user's code, and may refuse eval mode
        return False
    return True


def _parametrized(
    name: str,
    owner: ParametrizationList,
    layers: Mapping[str, nn.Module],
    attentions: Mapping[int, nn.MultiheadAttention],
) -> _Tensor:
    """A weight that is computed from its originals, under the name that the layer knows it by."""
    found = PARAMETRIZED.match(name)
    assert found is not None
    path = found["layer"].removesuffix(".")
    layer = layers[path]
    computation = Parametrized(owner)
    originals, like = tuple(computation.originals.values()), torch.empty(computation.shape, device="meta")
    clean = tag(found["layer"] + found["local"])
    return _Tensor(
        (clean, name), layer, originals, like, fused(path, layers), attentions.get(id(layer)), computation=computation
    )


def _pair(
    name: str, named: Mapping[str, tuple[nn.Parameter, nn.Module]], layers: Mapping[str, nn.Module]
) -> _Tensor | None:
    """The LoRA pair that this parameter is the A of."""
    found = FACTOR.fullmatch(name) if "lora_" in name else None
    if found is None:
        return None
    start, end = found.span("letter")
    partner = name[:start] + PARTNER[found["letter"]] + name[end:]
    path = found["layer"].removesuffix(".")
    layer = layers[path]
    if partner not in named or len(set(getattr(layer, "qkv_shapes", ()))) > 1:
        return None
    a, b = named[name][0], named[partner][0]
    experts = int(layer.num_experts) if type(layer).__name__ == "ParamWrapper" else 1  # type: ignore[arg-type]
    product = Product.of(a, b, experts)
    if product is None:
        return None
    clean = tag(f"{found['layer']}lora{found['adapter'] or ''}")
    like = torch.empty(product.shape(a, b), device="meta")
    return _Tensor((clean, name, partner), layer, (a, b), like, fused(path, layers), product=product)


def _product_view(tensor: _Tensor, product: Product, heads: bool) -> View | None:
    """The view of a LoRA pair's product: that of the weight that it is added to."""
    base = getattr(tensor.owner, "base_layer", tensor.owner)
    enabled = getattr(tensor.owner, "enable_lora", ())
    if isinstance(base, nn.MultiheadAttention):
        return view_of(base, "in_proj_weight", tensor.like, heads=heads)
    if isinstance(base, nn.Embedding):
        return View("d n -> n d")
    if isinstance(enabled, list | tuple) and len(enabled) == 3 and sum(enabled) == product.blocks > 1:
        parts = tuple(part for part, is_there in zip("qkv", enabled, strict=True) if is_there)
        return View("(parts d) n -> parts d n", {"parts": product.blocks}, parts)
    if product.experts:
        return View("(experts d) n -> experts d n", {"experts": product.blocks}).fitted(tensor.name, tensor.like.shape)
    return view_of(nn.Identity(), "weight", tensor.like, heads=heads, fused=tensor.fused)


def _own_views(views: Mapping[str, str | View], tensors: Sequence[_Tensor]) -> dict[_Tensor, View]:
    """The user's views of the tensors that they fit."""
    own = {}
    for pattern, view in views.items():
        hits = fitting("views", pattern, _owners(tensors))
        for tensor in tensors:
            if not hits.isdisjoint(tensor.names):
                own[tensor] = (View(view) if isinstance(view, str) else view).fitted(tensor.name, tensor.like.shape)
    return own


def _owners(tensors: Iterable[_Tensor]) -> dict[str, nn.Module]:
    """The layer of each tensor under each name that it may be matched by."""
    return {name: tensor.owner for tensor in tensors for name in tensor.names}
