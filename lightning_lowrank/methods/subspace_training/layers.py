"""Weights that move only along given directions.

Shape letters:  K directions
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lowrank.models.effective_weights import hooked
from lightning_lowrank.models.names import tag


class AlongDirections(nn.Module):
    """Parametrization of a weight: itself plus a sum of directions with trained coefficients.

    Args:
        directions: Directions, orthonormal as flat vectors. They are not in the state dict.
    """

    directions: Num[Tensor, "K *shape"]

    def __init__(self, directions: Num[Tensor, "K *shape"]) -> None:
        super().__init__()
        dtype = torch.promote_types(directions.dtype, torch.float32)
        self.coefficients = nn.Parameter(torch.zeros(len(directions), dtype=dtype, device=directions.device))
        self.register_buffer("directions", directions, persistent=False)

    def change(self) -> Tensor:
        """The weighted sum of the directions."""
        change: Tensor = torch.tensordot(self.coefficients.to(self.directions), self.directions, 1)
        return change

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, in the weight's own dtype."""
        return weight + self.change().to(weight.dtype)


@dataclass(frozen=True, eq=False)
class Place:
    """A weight that moves along directions.

    Attributes:
        name: Clean name of the weight.
        key: Its key in the original state dict.
        layer: The layer that has it.
        local: Its name in the layer.
        holder: The module that adds the sum.
    """

    name: str
    key: str
    layer: nn.Module
    local: str
    holder: AlongDirections

    @property
    def parametrization(self) -> str:
        """Path of what computes the weight."""
        path, dot, local = self.key.rpartition(".")
        return f"{path}{dot}parametrizations.{local}"

    @property
    def weight(self) -> nn.Parameter:
        """The weight without the sum."""
        chain = cast(nn.ModuleDict, self.layer.parametrizations)[self.local]
        return cast(nn.Parameter, chain.original)


def places(module: nn.Module, *, all_names: bool = False) -> list[Place]:
    """The weights of a module that move along directions.

    Args:
        all_names: Return a layer under each of its names.
    """
    return list(_places(module, all_names))


def _places(module: nn.Module, all_names: bool) -> Iterator[Place]:
    for path, layer in module.named_modules(remove_duplicate=not all_names):
        for local, chain in getattr(layer, "parametrizations", {}).items():
            for holder in chain:
                if isinstance(holder, AlongDirections):
                    key = f"{path}.{local}" if path else local
                    yield Place(tag(key), key, layer, local, holder)


def attach(layer: nn.Module, local: str, directions: Num[Tensor, "K *shape"]) -> None:
    """Let a weight move along directions; its value stays."""
    weight = getattr(layer, local)
    holder = AlongDirections(directions.to(weight.device, torch.promote_types(weight.dtype, torch.float32)))
    parametrize.register_parametrization(layer, local, holder, unsafe=True)


@torch.no_grad()
def detach(place: Place) -> None:
    """Add the change to the weight, and make it a plain parameter again."""
    weight = place.weight
    change = place.holder.change().to(weight.dtype)
    parametrize.remove_parametrizations(place.layer, place.local, leave_parametrized=False)
    weight.data += change


def trouble(layer: nn.Module, owners: int) -> str | None:
    """Why a weight of a layer cannot move along directions."""
    if isinstance(layer, ParametrizationList) or hooked(layer) or parametrize.is_parametrized(layer):
        return "a parametrization, a norm or a mask computes it"
    if isinstance(layer, nn.RNNBase):
        return f"{type(layer).__name__} stores its weights in one block of memory"
    return "several layers share it" if owners > 1 else None


def random_directions(shape: torch.Size, k: int, seed: int, name: str) -> Float[Tensor, "K *shape"]:
    """Random orthonormal directions, uniformly distributed; at most as many as a small tensor has entries."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    size = shape.numel()
    drawn = torch.randn(size, min(k, size), generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis.T.float().reshape(-1, *shape)
