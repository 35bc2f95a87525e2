"""Groups of units that may change places together without a change of what the network computes.

Shape letters:  n units of a group
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Binding:
    """The place of a group's units in a tensor: unit `u` from `start + u * inner` up to the next one.

    Attributes:
        name: Of the tensor.
        dim: The axis.
        start: Where the first unit begins.
        inner: Entries of each unit: 1 for neurons and channels, the head's width for heads, the places of an image for
            channels that were flattened.
    """

    name: str
    dim: int
    start: int = 0
    inner: int = 1


@dataclass(frozen=True)
class Group:
    """Units that change places together.

    Attributes:
        name: Of the layer that puts them out.
        size: How many units.
        bindings: Everywhere they lie.
    """

    name: str
    size: int
    bindings: tuple[Binding, ...]

    def view(self, tensors: Mapping[str, Tensor], binding: Binding) -> Tensor:
        """The units in a tensor, `[n, everything else]`."""
        axis = tensors[binding.name].movedim(binding.dim, 0)
        units = axis[binding.start : binding.start + self.size * binding.inner]
        return units.reshape(self.size, -1)

    def permute(self, tensors: dict[str, Tensor], order: Tensor) -> None:
        """Put unit `order[u]` at place `u`, in every tensor."""
        for binding in self.bindings:
            within = torch.arange(binding.inner, device=order.device)
            places = (binding.start + order[:, None] * binding.inner + within).flatten()
            tensor = tensors[binding.name]
            whole = torch.arange(tensor.shape[binding.dim], device=order.device)
            whole[binding.start : binding.start + len(places)] = places
            tensors[binding.name] = tensor.index_select(binding.dim, whole)


def groups_of(
    specification: Mapping[str, Sequence[Sequence[object]]], shapes: Mapping[str, Sequence[int]]
) -> list[Group]:
    """Groups as users write them, in JSON: name of the group -> `[tensor, axis]`, or `[tensor, axis, start, inner,
    size]` where the units are not the whole axis.

    Raises:
        ValueError: A tensor is unknown, or the sizes of a group differ.

    Examples:
        >>> groups_of({"hidden": [["0.weight", 0], ["0.bias", 0], ["2.weight", 1]]},
        ...           {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (2, 5)})[0].size
        5
    """
    return [_group(name, places, shapes) for name, places in specification.items()]


def _group(name: str, places: Sequence[Sequence[object]], shapes: Mapping[str, Sequence[int]]) -> Group:
    found, sizes = [], set()
    for place in places:
        tensor, dim, *rest = place
        if tensor not in shapes or not isinstance(tensor, str):
            raise ValueError(f"group {name!r}: there is no tensor {tensor!r}; the tensors are {list(shapes)[:8]}")
        if not isinstance(dim, int) or not 0 <= dim < len(shapes[tensor]) or len(rest) not in (0, 3):
            raise ValueError(
                f"group {name!r}: {list(place)} is not [tensor, axis] or [tensor, axis, start, inner, size]"
            )
        start, inner, size = (int(str(number)) for number in rest) if rest else (0, 1, shapes[tensor][dim])
        if start + inner * size > shapes[tensor][dim]:
            raise ValueError(
                f"group {name!r}: {list(place)} exceeds axis {dim} of {tensor}, {shapes[tensor][dim]} long"
            )
        found.append(Binding(tensor, dim, start, inner))
        sizes.add(size)
    if len(sizes) != 1:
        raise ValueError(f"group {name!r} has axes of {sorted(sizes)} units, but its members are permuted together")
    return Group(name, sizes.pop(), tuple(found))
