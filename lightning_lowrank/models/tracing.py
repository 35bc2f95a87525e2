"""Groups of units that can be permuted, read from a module with `torch.fx`.

Every value has the group of its features. Linear layers and convolutions begin a new group, norms and elementwise
functions keep it, and sums merge two groups. Inputs, outputs and the results of unknown operations are not permuted.
Wrong groups do no harm if each is tested on data before use.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import einops
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_lowrank.models.layouts import layout
from lightning_lowrank.models.unit_groups import Binding, Group
from lightning_lowrank.models.units import heads_of

FIXED = 0

NORMS = (_BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
ATOMIC = (
    nn.Linear,
    _ConvNd,
    nn.Embedding,
    nn.Flatten,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    *NORMS,
)
SUMS = {
    operator.add,
    operator.iadd,
    operator.sub,
    operator.mul,
    operator.imul,
    torch.add,
    torch.sub,
    torch.mul,
    "add",
    "mul",
}
# By name, of torch, of torch.nn.functional and of tensors: what treats every entry, or every channel, alike.
KEEPING = [
    "relu",
    "gelu",
    "tanh",
    "sigmoid",
    "silu",
    "elu",
    "selu",
    "celu",
    "mish",
    "hardswish",
    "hardtanh",
    "relu6",
    "softplus",
    "leaky_relu",
    "dropout",
    "dropout1d",
    "dropout2d",
    "max_pool1d",
    "max_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "mean",
    "contiguous",
    "clone",
    "detach",
    "to",
    "float",
    "double",
    "neg",
    "abs",
    "square",
    "relu_",
    "layer_norm_",
    "truediv",
    "squeeze",
]


class _Tracer(fx.Tracer):
    """Goes into everything but the layers that have a rule."""

    def __init__(self) -> None:
        # fx has no types.
        super().__init__(autowrap_functions=(einops.rearrange, einops.reduce, einops.repeat))

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, ATOMIC) or not any(True for _ in module.children())


class _Groups:
    """Groups in the making: numbers that become one."""

    def __init__(self) -> None:
        self._parents = [FIXED]
        self.sizes: list[int] = [0]
        self.names = [""]
        self.bindings: dict[int, list[Binding]] = defaultdict(list)

    def new(self, name: str, size: int) -> int:
        self._parents.append(len(self._parents))
        self.sizes.append(size)
        self.names.append(name)
        return len(self._parents) - 1

    def root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def join(self, one: int, other: int) -> int:
        low, high = sorted((self.root(one), self.root(other)))
        if self.sizes[low] != self.sizes[high] and low != FIXED:
            self._parents[low] = self._parents[high] = FIXED
            return FIXED
        self._parents[high] = low
        return low

    def bind(self, group: int, name: str, dim: int, inner: int = 1) -> None:
        self.bindings[group].append(Binding(name, dim, 0, inner))

    def found(self) -> Iterator[Group]:
        whole: dict[int, list[Binding]] = defaultdict(list)
        for group, bindings in self.bindings.items():
            whole[self.root(group)] += bindings
        for group, bindings in whole.items():
            if group != FIXED:
                yield Group(self.names[group], self.sizes[group], tuple(dict.fromkeys(bindings)))


def traced(module: nn.Module) -> list[Group]:
    """The groups of a module: of features, of heads, and of the entries within heads.

    Raises:
        ValueError: `torch.fx` cannot trace it, nor is it a transformer; a specification has to say.
    """
    try:
        return [*features(module), *_heads(module)]
    except ValueError:
        if found := layout(module):
            return found
        raise


def features(module: nn.Module) -> list[Group]:
    """Groups of neurons, channels and residual streams.

    Raises:
        ValueError: `torch.fx` cannot trace it.
    """
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # the user's own code runs on proxies
        raise ValueError(
            f"torch.fx cannot trace {type(module).__name__} ({type(error).__name__}: {error}). List the units that "
            "can be permuted with --specification FILE, a JSON file of {group: [[tensor, axis], ...]}"
        ) from error
    reader = _Reader(module)
    for node in graph.nodes:
        reader.read(node)
    return list(reader.groups.found())


class _Reader:
    """Reads a graph, node by node."""

    def __init__(self, module: nn.Module) -> None:
        self.groups = _Groups()
        self._layers = dict(module.named_modules())
        self._parameters = dict(module.named_parameters())
        self._of: dict[fx.Node, int] = {}

    def read(self, node: fx.Node) -> None:
        """Give a node its group."""
        rules: dict[str, Callable[[fx.Node], int]] = {
            "call_module": self._module,
            "call_function": self._function,
            "call_method": self._function,
            "get_attr": self._attribute,
        }
        before = [self._of[one] for one in node.all_input_nodes]
        rule = rules.get(node.op)
        self._of[node] = self._fixed(before) if rule is None else rule(node)

    def _fixed(self, groups: list[int]) -> int:
        for group in groups:
            self.groups.join(FIXED, group)
        return FIXED

    def _before(self, node: fx.Node) -> list[int]:
        return [self._of[one] for one in node.all_input_nodes]

    def _attribute(self, node: fx.Node) -> int:
        name = str(node.target)
        if name not in self._parameters:
            return FIXED
        group = self.groups.new(name, self._parameters[name].shape[-1])
        self.groups.bind(group, name, self._parameters[name].ndim - 1)
        return group

    def _function(self, node: fx.Node) -> int:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        before = self._before(node)
        if node.target in SUMS and before:
            group = before[0]
            for other in before[1:]:
                group = self.groups.join(group, other)
            return group
        if name in (*KEEPING, "flatten", "getitem") and len(before) == 1:
            return before[0]
        return self._fixed(before)

    def _module(self, node: fx.Node) -> int:
        name, before = str(node.target), self._before(node)
        layer = self._layers[name]
        if isinstance(layer, nn.Embedding):
            return self._puts_out(name, layer.embedding_dim, 1)
        if len(set(before)) != 1:
            return self._fixed(before)
        (group,) = set(before)
        if isinstance(layer, nn.Linear | _ConvNd):
            return self._linear(name, layer, group)
        if isinstance(layer, nn.MultiheadAttention):
            return self._attention(name, layer, group)
        if isinstance(layer, nn.TransformerEncoderLayer):
            return self._encoder_layer(name, layer, group)
        if isinstance(layer, NORMS):
            return self._norm(name, layer, group)
        parameters = any(True for _ in layer.parameters())
        return self._fixed(before) if parameters or not isinstance(layer, _keeping()) else group

    def _puts_out(self, name: str, size: int, dim: int = 0) -> int:
        group = self.groups.new(name, size)
        for local in ("weight", "bias"):
            if f"{name}.{local}" in self._parameters:
                self.groups.bind(group, f"{name}.{local}", min(dim, self._parameters[f"{name}.{local}"].ndim - 1))
        return group

    def _takes(self, name: str, group: int, dim: int = 1) -> None:
        size = self.groups.sizes[self.groups.root(group)]
        length = self._parameters[name].shape[dim]
        if size and length % size == 0:
            self.groups.bind(group, name, dim, length // size)
        else:
            self.groups.join(FIXED, group)

    def _linear(self, name: str, layer: nn.Module, group: int) -> int:
        transposed = isinstance(layer, _ConvTransposeNd)
        if getattr(layer, "groups", 1) != 1:
            if layer.groups == layer.in_channels == layer.out_channels:  # each channel by itself
                return self._norm(name, layer, group)
            return self._fixed([group])
        self._takes(f"{name}.weight", group, int(not transposed))
        new = self.groups.new(name, self._parameters[f"{name}.weight"].shape[int(transposed)])
        self.groups.bind(new, f"{name}.weight", int(transposed))
        if f"{name}.bias" in self._parameters:
            self.groups.bind(new, f"{name}.bias", 0)
        return new

    def _norm(self, name: str, layer: nn.Module, group: int) -> int:
        if isinstance(layer, nn.GroupNorm) and layer.num_groups != 1:
            return self._fixed([group])
        for local, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.ndim:
                self.groups.bind(group, f"{name}.{local}", 0)
        return group

    def _attention(self, name: str, layer: nn.MultiheadAttention, group: int) -> int:
        if not layer._qkv_same_embed_dim:
            return self._fixed([group])
        self._takes(f"{name}.in_proj_weight", group)
        return self._puts_out(f"{name}.out_proj", layer.embed_dim)

    def _encoder_layer(self, name: str, layer: nn.TransformerEncoderLayer, group: int) -> int:
        """Both branches are added to the stream."""
        stream = self.groups.join(group, self._attention(f"{name}.self_attn", layer.self_attn, group))
        for norm in ("norm1", "norm2"):
            self._norm(f"{name}.{norm}", getattr(layer, norm), stream)
        hidden = self._linear(f"{name}.linear1", layer.linear1, stream)
        return self.groups.join(stream, self._linear(f"{name}.linear2", layer.linear2, hidden))


def _keeping() -> tuple[type[nn.Module], ...]:
    """Layers without parameters that treat every entry, or every channel, alike."""
    pools = [getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax") for d in (1, 2, 3)]
    activations = [one for one in vars(nn.modules.activation).values() if isinstance(one, type)]
    modules = [one for one in activations if issubclass(one, nn.Module) and one is not nn.MultiheadAttention]
    return (*modules, *pools, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.Flatten)


def heads(module: nn.Module, counts: Mapping[str, int]) -> list[Group]:
    """Heads of attention: queries, keys and values, and what reads them.

    Args:
        module: Anything.
        counts: Heads by patterns of names of output projections, for those that are not found.
    """
    parameters = dict(module.named_parameters())
    found = []
    for name, units in heads_of(module, counts).items():
        out = f"{name}.weight"
        read = _projected(name.rpartition(".")[0], parameters, parameters[out].shape[1])
        if units.count < 2 or units.axis != 1 or read is None:
            continue
        width = parameters[out].shape[1] // units.count
        projections = [Binding(n, 0, start, width) for one in read for n, start in one]
        found.append(Group(f"{name} heads", units.count, (*projections, Binding(out, 1, 0, width))))
    return found


def _heads(module: nn.Module) -> Iterator[Group]:
    """Heads of attention, and the entries within each: of queries with keys, of values with what reads them."""
    for group in heads(module, {}):
        name = group.name.removesuffix(" heads")
        *projections, result = group.bindings
        third = len(projections) // 3
        queries, keys, values = (projections[i * third : (i + 1) * third] for i in range(3))
        yield group
        for head in range(group.size):
            one, other, last, out = (_moved(bound, head * result.inner) for bound in (queries, keys, values, [result]))
            yield Group(f"{name} queries and keys of head {head}", result.inner, (*one, *other))
            yield Group(f"{name} values of head {head}", result.inner, (*last, *out))


def _moved(bindings: Iterable[Binding], by: int) -> list[Binding]:
    """The entries of one head, each a unit."""
    return [Binding(bound.name, bound.dim, bound.start + by) for bound in bindings]


def _projected(owner: str, parameters: dict[str, Any], width: int) -> list[list[tuple[str, int]]] | None:
    """Where queries, keys and values come out: tensors with the row at which each begins."""
    before = f"{owner}." if owner else ""
    siblings = {name: p for name, p in parameters.items() if name.startswith(before)}
    for weight, bias in (
        ("in_proj_weight", "in_proj_bias"),
        ("qkv.weight", "qkv.bias"),
        ("c_attn.weight", "c_attn.bias"),
    ):
        fused = siblings.get(before + weight)
        if fused is not None and fused.shape[0] == 3 * width:
            names = [before + weight, *[before + bias] * (siblings.get(before + bias) is not None)]
            return [[(name, part * width) for name in names] for part in range(3)]
    for endings in (
        ("q_proj", "k_proj", "v_proj"),
        ("query", "key", "value"),
        ("q", "k", "v"),
        ("q_lin", "k_lin", "v_lin"),
    ):
        layers = [before + ending for ending in endings]
        if all(f"{layer}.weight" in siblings and siblings[f"{layer}.weight"].shape[0] == width for layer in layers):
            return [
                [(f"{layer}.{local}", 0) for local in ("weight", "bias") if f"{layer}.{local}" in siblings]
                for layer in layers
            ]
    return None
