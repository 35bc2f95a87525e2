"""Files of a shared basis: read one tensor at a time.

A file of safetensors has, of each tensor NAME of the model, `mean/NAME`, `components/NAME` `[K, ...]`, `values/NAME`
`[K]`, and of each model in it `coefficients/NAME` `[N, K]` and `energies/NAME` `[N]`. Its metadata have the paths of
the models and of their base.

Shape letters:  N models   K components   P parameters of a tensor
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Num
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lowrank.models.unreadable_files import why_unreadable

FORMAT = "lightning-lowrank subspace 1"


@dataclass(frozen=True)
class Share:
    """The part of a basis that belongs to one tensor.

    Attributes:
        mean: Of the updates.
        components: Orthonormal as flat vectors, strongest first.
        values: Energy of the centred updates along each.
        coefficients: Of the models about the mean.
        energies: Squared norms of the updates of the models.
    """

    mean: Num[Tensor, "*shape"]
    components: Num[Tensor, "K *shape"]
    values: Num[Tensor, " K"]
    coefficients: Num[Tensor, "N K"]
    energies: Num[Tensor, " N"]

    @property
    def directions(self) -> Float[Tensor, "K P"]:
        """Components as flat vectors, in float64."""
        return self.components.double().reshape(len(self.components), self.mean.numel())

    def project(self, update: Num[Tensor, "*shape"]) -> Float[Tensor, " K"]:
        """Coefficients of an update about the mean."""
        return self.directions @ (update.double() - self.mean.double()).flatten()

    def rebuilt(self, coefficients: Num[Tensor, " k"]) -> Float[Tensor, "*shape"]:
        """The update that has these coefficients, of the first components where there are fewer."""
        update: Tensor = coefficients.double() @ self.directions[: len(coefficients)]
        return self.mean.double() + update.reshape(self.mean.shape)


class Basis:
    """A file of `subspace fit`, mapped.

    Attributes:
        path: Of the file.
        models: Paths of the models that it is of.
        base: What their updates are from, if that is known.
        is_of_updates: Updates were taken, and not weights themselves.
        shapes: Of the tensors of the model, by name.
        ks: How many components there are of each.

    Raises:
        ValueError: There is no such file, or it is no basis.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no file {path}; lightning-lowrank subspace fit ... --output writes one")
        try:
            self._file: Any = _opened(self.path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {why_unreadable(self.path, error)}") from error
        known: dict[str, str] = self._file.metadata() or {}
        if known.get("format") != FORMAT:
            raise ValueError(f"{path} is not a basis; lightning-lowrank subspace fit ... --output writes one")
        self.models: list[str] = json.loads(known["models"])
        self.base: str | None = json.loads(known["base"])
        self.is_of_updates: bool = json.loads(known["is_of_updates"])
        self.shapes: dict[str, torch.Size] = {}
        self.ks: dict[str, int] = {}
        for name in json.loads(known["tensors"]):
            k, *shape = self._file.get_slice(f"components/{name}").get_shape()
            self.shapes[name], self.ks[name] = torch.Size(shape), k

    def share(self, name: str) -> Share:
        """The part that belongs to one tensor."""
        parts = ("mean", "components", "values", "coefficients", "energies")
        return Share(*(self._file.get_tensor(f"{part}/{name}") for part in parts))

    def values(self) -> Float[Tensor, " Q"]:
        """Energies along all components, tensor by tensor; they tell this basis from others."""
        return torch.cat([self._file.get_tensor(f"values/{name}").double() for name in self.shapes])


def _opened(path: Path) -> Any:  # safetensors has no types
    return safe_open(path, framework="pt")


def layout(
    shapes: Mapping[str, Sequence[int]], ks: Mapping[str, int], num_models: int
) -> dict[str, tuple[str, list[int]]]:
    """Keys of a basis with what is under each."""
    found: dict[str, tuple[str, list[int]]] = {}
    for name in shapes:  # the wide ones first: readers want them aligned
        found[f"values/{name}"] = ("F64", [ks[name]])
        found[f"coefficients/{name}"] = ("F64", [num_models, ks[name]])
        found[f"energies/{name}"] = ("F64", [num_models])
    for name, shape in shapes.items():
        found[f"mean/{name}"] = ("F32", list(shape))
        found[f"components/{name}"] = ("F32", [ks[name], *shape])
    return found
