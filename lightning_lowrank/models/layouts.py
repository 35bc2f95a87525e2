"""Groups of units of transformers that `torch.fx` cannot trace, as those of Hugging Face: by their layers.

The residual stream is all that is as wide as the attention reads. What of this does not hold for a model does no harm:
`analysis/connect/matching.py` tries each group on data before it uses it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import takewhile

from torch import nn

from lightning_lowrank.models.axes import is_transposed
from lightning_lowrank.models.unit_groups import Binding, Group
from lightning_lowrank.models.units import Units, heads_of, is_projection, linear_layers, neurons_of

Places = list[tuple[str, int, int]]


def layout(module: nn.Module) -> list[Group]:
    """Heads, what is within them, neurons and the stream of a transformer; none where there are no heads."""
    layers, heads = linear_layers(module), heads_of(module, {})
    read = {name: _before(name, layers) for name in heads}
    neurons = {name: _giving(name, layers, read) for name in neurons_of(module, None, list(heads))}
    if not any(read.values()):
        return []
    groups = [group for name, units in heads.items() for group in _heads(name, units, read[name], layers)]
    groups += [_neurons(name, several, layers) for name, several in neurons.items() if several]
    taking = [*(n for several in read.values() for n in several), *(n for several in neurons.values() for n in several)]
    groups.append(_stream(module, layers, taking, [*heads, *neurons]))
    known = dict(module.named_parameters())  # tied ones under their first name
    bindings = [tuple(one for one in group.bindings if one.name in known) for group in groups]
    return [replace(group, bindings=bound) for group, bound in zip(groups, bindings, strict=True)]


def _before(name: str, layers: Mapping[str, nn.Module]) -> list[str]:
    """The layers that queries, keys and values come from, under the nearest module above an output projection."""
    parent = name
    while "." in parent:
        parent = parent.rpartition(".")[0]
        inside = [other for other in layers if other.startswith(f"{parent}.") and other != name]
        found = [other for other in inside if is_projection(other)]
        if found:
            return found
    return []


def _giving(name: str, layers: Mapping[str, nn.Module], read: Mapping[str, list[str]]) -> list[str]:
    """The layers right before one that reads neurons which put these out: one, or two where one gates the other."""
    names, size = list(layers), _sizes(layers[name])[0]
    others = {*read, *(one for several in read.values() for one in several)}
    before = reversed(names[: names.index(name)])
    return list(takewhile(lambda other: other not in others and _sizes(layers[other])[1] == size, before))


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs."""
    first, second = layer.get_parameter("weight").shape[:2]
    return (first, second) if is_transposed(layer) else (second, first)


def _inputs(name: str, layers: Mapping[str, nn.Module]) -> Binding:
    return Binding(f"{name}.weight", 0 if is_transposed(layers[name]) else 1)


def _outputs(name: str, layers: Mapping[str, nn.Module]) -> Iterator[Binding]:
    yield Binding(f"{name}.weight", 1 if is_transposed(layers[name]) else 0)
    if layers[name].bias is not None:
        yield Binding(f"{name}.bias", 0)


def _heads(name: str, units: Units, read: list[str], layers: Mapping[str, nn.Module]) -> Iterator[Group]:
    """Heads of an attention, and the entries within each: of queries with keys, of values with what reads them."""
    total = units.count * (width := _sizes(layers[name])[0] // units.count)
    places = _by_part(read, layers, total)
    if len(places) != 3 or units.count < 2:
        return

    def bound(part: str, start: int, inner: int) -> list[Binding]:
        return [Binding(tensor, dim, first + start, inner) for tensor, dim, first in places[part]]

    result = _inputs(name, layers)
    whole = [one for part in "qkv" for one in bound(part, 0, width)]
    yield Group(f"{name} heads", units.count, (*whole, Binding(result.name, result.dim, 0, width)))
    for head in range(units.count):
        start = head * width
        yield Group(f"{name} queries and keys of head {head}", width, (*bound("q", start, 1), *bound("k", start, 1)))
        last = Binding(result.name, result.dim, start)
        yield Group(f"{name} values of head {head}", width, (*bound("v", start, 1), last))


def _by_part(read: list[str], layers: Mapping[str, nn.Module], total: int) -> dict[str, Places]:
    """By "q", "k" and "v" where they come out: tensor, axis and first entry; fewer where that is not known."""
    found: dict[str, Places] = {}
    for name in read:
        size = _sizes(layers[name])[1]
        letter = re.search("[qkv]", name.rpartition(".")[2].lower())
        parts = "qkv" if size == 3 * total else letter[0] if letter and size == total else ""
        for i, part in enumerate(parts):
            found[part] = [(one.name, one.dim, i * total) for one in _outputs(name, layers)]
    return found


def _neurons(name: str, giving: list[str], layers: Mapping[str, nn.Module]) -> Group:
    out = [one for other in giving for one in _outputs(other, layers)]
    return Group(f"{name} neurons", _sizes(layers[name])[0], (*out, _inputs(name, layers)))


def _stream(module: nn.Module, layers: Mapping[str, nn.Module], taking: list[str], giving: list[str]) -> Group:
    """All that is as wide as what the attention reads; layers of neither kind on both sides."""
    width = _sizes(layers[taking[0]])[0]
    bindings = [_inputs(name, layers) for name in taking]
    bindings += [one for name in giving for one in _outputs(name, layers)]
    for name in (name for name in layers if name not in taking and name not in giving):
        inputs, outputs = _sizes(layers[name])
        bindings += [_inputs(name, layers)] if inputs == width else []
        bindings += _outputs(name, layers) if outputs == width else []
    inside = {f"{name}.{local}" for name in layers for local in ("weight", "bias")}
    for name, parameter in module.named_parameters():  # norms, embeddings, learnt places
        if name not in inside and parameter.shape[-1:] == (width,):
            bindings.append(Binding(name, parameter.ndim - 1))
    return Group("stream", width, tuple(dict.fromkeys(bindings)))
