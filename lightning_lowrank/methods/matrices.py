"""Parameters that methods act on: matrices, chosen by patterns or by default."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lowrank.models.names import chosen_parameters

Patterns = str | Sequence[str] | None
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class Owner(NamedTuple):
    """A layer that has a parameter, under one of its names."""

    path: str
    layer: nn.Module
    local: str


@dataclass(frozen=True)
class Choice:
    """The chosen matrices.

    Attributes:
        matrices: By tag.
        left_out: Tags of matrices that are left alone unless they are matched, each with the reason.
    """

    matrices: dict[str, nn.Parameter]
    left_out: dict[str, str]


def matrices(module: nn.Module, match: Patterns, exclude: Patterns) -> Choice:
    """The matrices that `match` matches, without those that `exclude` matches.

    Default: all except embeddings and the head, which is the last layer that has a matrix. Kernels of convolutions are
    matrices with outputs as rows.

    Raises:
        ValueError: A pattern matches nothing, or there is no matrix.
    """
    chosen = chosen_parameters(module, match, exclude)
    found = {tag: p for tag, p in chosen.items() if is_matrix(p)}
    if not found:
        raise ValueError(f"there is no matrix among the parameters {list(chosen)[:10]}")
    left_out = {} if match is not None else unusual(module, found)
    kept = {tag: p for tag, p in found.items() if tag not in left_out}
    if not kept:
        raise ValueError(f"all matrices are embeddings or the head; name some of them in match: {left_out}")
    return Choice(kept, left_out)


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter has real numbers and more than one row and column; False if it has no shape yet."""
    if is_lazy(parameter) or not parameter.is_floating_point():
        return False
    return parameter.ndim >= 2 and min(sides(parameter)) >= 2


def sides(parameter: nn.Parameter) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix."""
    return parameter.shape[0], prod(parameter.shape[1:])


def unusual(module: nn.Module, found: dict[str, nn.Parameter]) -> dict[str, str]:
    """Embeddings and the head, which is the last layer that has a matrix, by tag."""
    tags = {id(p): tag for tag, p in found.items()}
    layers = [
        (layer, tags[id(p)]) for layer in module.modules() for p in layer.parameters(recurse=False) if id(p) in tags
    ]
    unusual = {tag: "embedding" for layer, tag in layers if isinstance(layer, EMBEDDINGS)}
    last, tag = layers[-1]
    return unusual | ({tag: "head"} if isinstance(last, nn.Linear) and tag not in unusual else {})


def owners_of(module: nn.Module, *, all_names: bool = False) -> dict[int, list[Owner]]:
    """The layers that have each parameter, by its id; several if it is shared.

    Args:
        all_names: Return a layer under each of its names.
    """
    found: dict[int, list[Owner]] = {}
    for path, layer in module.named_modules(remove_duplicate=not all_names):
        for local, parameter in layer._parameters.items():
            found.setdefault(id(parameter), []).append(Owner(path, layer, local))
    return found
