"""The parts of a model that may share the learning unequally: modules, attention heads, neurons.

Heads and neurons are found in the layers that read them. A head is a block of inputs of its attention's output
projection; a neuron is an input of the layer after its activation. A gate on it has an exact gradient there
(`gates.py`).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from lightning_lowrank.models.axes import is_transposed
from lightning_lowrank.models.effective_weights import hooked
from lightning_lowrank.models.fused import NUM_HEADS, fused
from lightning_lowrank.models.names import fitting, tags

# Layers that queries, keys or values come from, alone or as one, and those that turn places into them: by the last part
# of their names.
PROJECTION = re.compile(
    r"(pos_)?([qkv]|query|key|value)(_?proj|_?lin|_?attn|s)?|(to_?|w_?)[qkv]|pos_proj|head_(logits|weights)_proj",
    re.IGNORECASE,
)
# Here the name is enough: in whichever order queries, keys and values lie, each is a third of what comes out.
ALL_THREE = re.compile(r"(\w+_)?qkv(_\w+)?|w_?qkv|c_attn|query_key_value", re.IGNORECASE)
# Layers that read hidden neurons, where the sizes of those before do not tell.
DOWN = re.compile(
    r"\w*down(_?proj)?|(fc|lin|linear|dense|w|ff|ffn|conv)_?2|[cw]_?proj|fc_?out|w?o|dense_4h_to_h|proj_?out",
    re.IGNORECASE,
)


def is_projection(name: str) -> bool:
    """Whether queries, keys or values come out of a layer, by the last part of its name."""
    local = name.rpartition(".")[2]
    return bool(PROJECTION.fullmatch(local) or ALL_THREE.fullmatch(local))


@dataclass(frozen=True, eq=False)
class Units:
    """One or several units, and the parameters that they have a share of.

    Attributes:
        name: Of the module, or of the layer that reads the units.
        parameters: All of a module's; the one weight that reads heads or neurons.
        axis: Of the weight, along which the units lie.
        count: How many units.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    axis: int = 0
    count: int = 1


def modules_of(parameters: Mapping[str, nn.Parameter]) -> list[Units]:
    """Layers with parameters of their own, each one unit."""
    owned: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        owned.setdefault(name.rpartition(".")[0], []).append(parameter)
    return [Units(name, tuple(own)) for name, own in owned.items()]


def heads_of(module: nn.Module, counts: Mapping[str, int]) -> dict[str, Units]:
    """The output projections of attention with their heads, by the name of the projection.

    Args:
        module: Anything with `nn.MultiheadAttention`, fused or separate layers for queries, keys and values.
        counts: Heads by patterns of names of output projections, for those that are not found.

    Raises:
        ValueError: A pattern matches nothing that can be read, or a count does not divide the inputs.
    """
    layers, weights = linear_layers(module), _weights(module)
    found = dict(_projections(module, layers))
    for pattern, count in counts.items():
        found |= dict.fromkeys(_chosen("heads", pattern, layers, weights), count)
    return {
        name: _part(name, layers, weights[name], count, "heads") for name, count in found.items() if name in weights
    }


def neurons_of(module: nn.Module, patterns: str | Sequence[str] | None, projections: Sequence[str]) -> dict[str, Units]:
    """The layers that read hidden neurons, with their inputs.

    Args:
        module: Anything.
        patterns: Names of the layers. Default: the second of two linear layers (or convolutions) that belong together
            and are not part of an attention. It must have as many inputs as the first has outputs.
        projections: Output projections of attention layers.

    Raises:
        ValueError: A pattern matches nothing that reads units.
    """
    layers, weights = linear_layers(module), _weights(module)
    names = _hidden(module, layers, projections) if patterns is None else _chosen("neurons", patterns, layers, weights)
    return {
        name: _part(name, layers, weights[name], _inputs(layers[name]), "neurons") for name in names if name in weights
    }


def _projections(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, int]]:
    """Output projections with their number of heads: the first linear layer behind those of queries, keys and values
    that fits them. In one module these come first, wherever they are declared.
    """
    everything = dict(module.named_modules())
    for name, layer in everything.items():
        if isinstance(layer, nn.MultiheadAttention) and f"{name}.out_proj".lstrip(".") in layers:
            yield f"{name}.out_proj".lstrip("."), layer.num_heads
    widths = {name: _width(name, layer, everything) for name, layer in layers.items()}
    siblings = (list(names) for _, names in groupby(layers, lambda name: name.rpartition(".")[0]))
    before, width = "", 0
    for name in (name for names in siblings for name in sorted(names, key=lambda name: not widths[name])):
        if widths[name]:
            before, width = name, max(width, widths[name])
            continue
        if before and _inputs(layers[name]) == width:
            heads = num_heads(before, everything, width)
            yield from [(name, heads)] if heads else []
        before, width = "", 0


def _width(name: str, layer: nn.Module, modules: Mapping[str, nn.Module]) -> int:
    """How many queries come out of it (or keys, where there are no queries), 0 where it is no part of an attention."""
    read, local = fused(name, modules), name.rpartition(".")[2]
    if read is not None:
        return read.width(_outputs(layer))
    if PROJECTION.fullmatch(local):
        return _outputs(layer)
    return _inputs(layer) if ALL_THREE.fullmatch(local) and _outputs(layer) == 3 * _inputs(layer) else 0


def num_heads(name: str, modules: Mapping[str, nn.Module], width: int) -> int:
    """How many heads share so many columns of a layer, as the nearest module above it says, or its config; 0 where none
    does.
    """
    while name:
        name = name.rpartition(".")[0]
        for holder in (modules[name], getattr(modules[name], "config", None)):
            for attribute in NUM_HEADS:
                count = getattr(holder, attribute, None)
                if type(count) is int and count > 0 and width % count == 0:
                    return count
    return 0


def _hidden(module: nn.Module, layers: Mapping[str, nn.Module], projections: Sequence[str]) -> Iterator[str]:
    """Second layers of pairs; what is between the factors of a LoRA pair is no neuron."""
    modules = dict(module.named_modules())
    for (first, giving), (second, taking) in pairwise(layers.items()):
        others = any(
            name in projections or "lora_" in name or _width(name, layers[name], modules) for name in (first, second)
        )
        alike = isinstance(giving, _ConvNd) == isinstance(taking, _ConvNd)
        if alike and not others and 0 < _outputs(giving) == _inputs(taking) and _belong_together(first, second):
            parent = modules[second.rpartition(".")[0]]
            gated = first.endswith("w2") and second.endswith(
                "w3"
            )  # as Meta's Llama has them: the first one is the last
            told = _outputs(giving) != _inputs(giving) or isinstance(parent, nn.Sequential) or _is_down(first, second)
            yield from [second] if told and not gated else []


def _is_down(first: str, second: str) -> bool:
    """Whether the name of the second says that it reads the first. Where the first puts out as much as it takes, as
    gates do where the hidden size is that of the model, both may as well read the same.
    """
    words = zip(first.split("."), second.split("."), strict=True)
    differing = next((word for other, word in words if other != word), "")
    return DOWN.fullmatch(differing) is not None or (first.endswith(".dense") and differing == "output")


def _belong_together(first: str, second: str) -> bool:
    """Whether two layers have one parent, or parents with words for names and one parent: not blocks of a sequence."""
    one, other = first.split("."), second.split(".")
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
    below = len(one) - common
    return below == len(other) - common and (below == 1 or (below == 2 and not one[common].isdecimal()))


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers that multiply what comes in by a weight, in the order of the module."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | _ConvNd) or is_transposed(layer)
    }


def _chosen(
    argument: str, patterns: str | Sequence[str], layers: Mapping[str, nn.Module], weights: Mapping[str, nn.Parameter]
) -> list[str]:
    """The layers that a user names."""
    names = sorted(fitting(argument, patterns, layers))
    if names and weights.keys().isdisjoint(names) and not any(_is_lazy(layers[name]) for name in names):
        why = "computed (by a parametrization), shared with another layer, packed, or grouped"
        raise ValueError(
            f"{argument}: {patterns!r} matches {names[:5]}, whose weights have no separate part for each input, "
            f"since they are {why}"
        )
    return names


def _part(name: str, layers: Mapping[str, nn.Module], weight: nn.Parameter, count: int, argument: str) -> Units:
    axis = _axis(layers[name])
    if type(count) is not int or count < 1 or weight.shape[axis] % count:
        raise ValueError(f"{argument}: {name!r} has {weight.shape[axis]} inputs, which {count!r} does not divide")
    return Units(tags(layers)[name], (weight,), axis, count)


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of which a block is read by one layer and by nothing else, by the name of the layer.

    Not those that are computed from others, have no shape yet, are packed, or have groups; nor those that another layer
    has too: in an embedding's gradient, or that of a layer before, a gate on these inputs has no part.
    """
    owners = Counter(id(parameter) for owner in module.modules() for parameter in owner._parameters.values())
    found = {}
    for name, layer in linear_layers(module).items():
        weight = _stepped(layer)
        if weight is None or is_lazy(weight) or weight.ndim < 2 or owners[id(weight)] > 1:
            continue
        if weight.shape[_axis(layer)] == _inputs(layer):
            found[name] = weight
    return found


def _stepped(layer: nn.Module) -> nn.Parameter | None:
    """Its weight; where that is pruned, what it is pruned from: masked, its gradient is the weight's."""
    original = hooked(layer).get("weight_orig")
    return layer._parameters.get("weight") if original is None or not original.is_pruned else original.largest


def _is_lazy(layer: nn.Module) -> bool:
    return any(is_lazy(parameter) for parameter in layer.parameters(recurse=False))


def _axis(layer: nn.Module) -> int:
    return 0 if is_transposed(layer) or isinstance(layer, _ConvTransposeNd) else 1


def _inputs(layer: nn.Module) -> int:
    return _size(layer, "in_features", "in_channels", "nx")


def _outputs(layer: nn.Module) -> int:
    return _size(layer, "out_features", "out_channels", "nf")


def _size(layer: nn.Module, *names: str) -> int:
    """As the layer says: to look at a parametrised weight would compute it, and may change it."""
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), 0)
