"""Weights that are computed from several parameters: LoRA pairs, those under `torch.nn.utils.parametrize`, and those
that a hook computes before each call (pruning, the older weight and spectral norm).

Shape letters:  M rows, N columns of a weight   R rank of a LoRA pair
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype

# Shapes of parametrised weights with the number of parametrizations that they were computed under.
_SHAPES: WeakKeyDictionary[ParametrizationList, tuple[int, torch.Size]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Product:
    """How the A and B of a LoRA pair are multiplied.

    Attributes:
        blocks: A stacks the factors of this many blocks, B their partners: groups of a convolution; q, k and v;
            experts.
        experts: The blocks are experts in peft's layout: the expert is the faster index of B's columns, the slower one
            of A's rows.
        transposed: The layer computes `x A B`, not `B A x`.
    """

    blocks: int = 1
    experts: bool = False
    transposed: bool = False

    @classmethod
    def of(cls, a: Tensor, b: Tensor, experts: int) -> "Product | None":
        """The product that the shapes allow, None where they allow none."""
        if min(a.ndim, b.ndim) < 2 or 0 in (*a.shape, *b.shape):
            return None
        if a.shape[1] == b.shape[0] < a.shape[0] and a.ndim == 2:
            return cls(transposed=True)
        blocks = a.shape[0] * experts // b[0].numel()
        fits = (
            a.shape[0] * experts == b[0].numel() * blocks and b.shape[0] * experts % max(blocks, 1) == 0 and blocks > 0
        )
        return cls(blocks, experts > 1) if fits else None

    def __call__(self, a: Shaped[Tensor, "R ..."], b: Shaped[Tensor, "M ..."]) -> Shaped[Tensor, "_ N"]:
        """The product; of several blocks one above the other."""
        if self.transposed:
            return (a @ b).mT
        experts = self.blocks if self.experts else 1
        tall = rearrange(b.flatten(1), "m (r e) -> (e m) r", e=experts)
        stacked = rearrange(tall, "(g m) r -> g m r", g=self.blocks) @ rearrange(
            a.flatten(1), "(g r) n -> g r n", g=self.blocks
        )
        return rearrange(stacked, "g m n -> (g m) n")

    def shape(self, a: Tensor, b: Tensor) -> tuple[int, int]:
        """Shape of the product."""
        if self.transposed:
            return b.shape[1], a.shape[0]
        return b.shape[0] * (self.blocks if self.experts else 1), a[0].numel()


def wide(tensor: Tensor) -> Tensor:
    """A factor wide enough for the product to keep its rank: rounded to bfloat16 it would have every rank."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, working_dtype(tensor.device)))


@contextmanager
def undisturbed(parametrization: ParametrizationList) -> Iterator[dict[str, Tensor]]:
    """The parametrization in eval mode, with copies of its buffers to compute with; generators, flags and attributes
    are put back after.
    """
    kept = {module: dict(module.__dict__) for module in parametrization.modules()}
    tensors = [(t, t.clone()) for attributes in kept.values() for t in attributes.values() if isinstance(t, Tensor)]
    numbers = random.getstate()
    device = next(parametrization.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), full_precision(device):
        try:
            for module in kept:
                module.training = False
            yield {name: buffer.clone() for name, buffer in parametrization.named_buffers()}
        finally:
            for module, attributes in kept.items():
                module.__dict__.clear()
                module.__dict__.update(attributes)
            for tensor, content in tensors:
                tensor.copy_(content)
            random.setstate(numbers)


class Computation(ABC):
    """How the weight that a layer multiplies by is computed from parameters that the optimizer steps."""

    @property
    @abstractmethod
    def originals(self) -> dict[str, nn.Parameter]:
        """Parameters of the computation, by their names in the module."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the weight."""

    @abstractmethod
    def _quietly(self) -> AbstractContextManager[Callable[..., Tensor]]:
        """What computes the weight from values of the originals, without a trace."""

    def __call__(self, *values: Tensor) -> Tensor:
        """The weight as the layer would have it in evaluation, at values of the originals, without a trace."""
        with self._quietly() as compute:
            return compute(*values).detach()

    def tangent(self, values: Sequence[Tensor], changes: Sequence[Tensor]) -> Tensor:
        """Change of the weight with changes of the originals: that of the largest one, as it is where it has the
        weight's shape; else to first order.
        """
        largest = max(changes, key=Tensor.numel).detach()
        return largest if largest.shape == self.shape else self._pushed_forward(values, changes)

    def _pushed_forward(self, values: Sequence[Tensor], changes: Sequence[Tensor]) -> Tensor:
        with self._quietly() as compute:
            # Not torch.func.jvp: its first call compiles TorchScript, with a warning that is not the user's.
            _, change = torch.autograd.functional.jvp(
                compute, tuple(v.detach() for v in values), tuple(c.detach() for c in changes)
            )
            return change  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Parametrized(Computation):
    """A weight under `torch.nn.utils.parametrize`."""

    owner: ParametrizationList

    @property
    def originals(self) -> dict[str, nn.Parameter]:
        """All of them."""
        return {name: parameter for name, parameter in self.owner._parameters.items() if parameter is not None}

    @property
    def shape(self) -> torch.Size:
        """Computed once, since a parametrization may be expensive."""
        known = _SHAPES.get(self.owner)
        if known is None or known[0] != len(self.owner):
            known = _SHAPES[self.owner] = (len(self.owner), self(*self.originals.values()).shape)
        return known[1]

    @contextmanager
    def _quietly(self) -> Iterator[Callable[..., Tensor]]:
        """With generators, buffers, flags and attributes put back after."""
        with undisturbed(self.owner) as buffers:
            yield lambda *values: functional_call(
                self.owner, {**buffers, **dict(zip(self.originals, values, strict=True))}, ()
            )


@dataclass(frozen=True, eq=False)
class Hooked(Computation):
    """A weight that a hook computes before each call of its layer: pruned, or under the older weight or spectral norm.

    Attributes:
        layer: It, which has the originals, and masks or singular vectors as buffers.
        hook: That of PyTorch.
    """

    layer: nn.Module
    hook: BasePruningMethod | SpectralNorm | WeightNorm

    @property
    def local(self) -> str:
        """The name that the layer knows the weight by."""
        return str(self.hook._tensor_name if isinstance(self.hook, BasePruningMethod) else self.hook.name)

    @property
    def is_pruned(self) -> bool:
        """Whether the weight is its one original times a mask."""
        return isinstance(self.hook, BasePruningMethod)

    @property
    def originals(self) -> dict[str, nn.Parameter]:
        """`weight_orig`; or `weight_g`, the lengths, and `weight_v`, the directions."""
        named = {f"{self.local}_{end}": self.layer._parameters.get(f"{self.local}_{end}") for end in ("orig", "g", "v")}
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    @property
    def largest(self) -> nn.Parameter:
        """The original that has the weight's shape."""
        return max(self.originals.values(), key=Tensor.numel)

    @property
    def shape(self) -> torch.Size:
        """Shape of the largest original."""
        return self.largest.shape

    @contextmanager
    def _quietly(self) -> Iterator[Callable[..., Tensor]]:
        with full_precision(self.largest.device):
            yield self._by_formula

    def _by_formula(self, *values: Tensor) -> Tensor:
        """PyTorch's own; of a spectral norm with the singular vectors of now."""
        given: Any = SimpleNamespace(**self.layer._buffers | dict(zip(self.originals, values, strict=True)))
        if isinstance(self.hook, BasePruningMethod):
            return self.hook.apply_mask(given)  # type: ignore[no-any-return]
        if isinstance(self.hook, SpectralNorm):
            return self.hook.compute_weight(given, do_power_iteration=False)
        return self.hook.compute_weight(given)  # type: ignore[no-any-return]

    def tangent(self, values: Sequence[Tensor], changes: Sequence[Tensor]) -> Tensor:
        """For a pruned weight, the change times the mask, since masked entries have no effect."""
        return self(*changes) if self.is_pruned else super().tangent(values, changes)


def hooked(layer: nn.Module) -> dict[str, Hooked]:
    """How each hooked weight is computed, by the name of each parameter of a layer that is its original."""
    kinds = (BasePruningMethod, SpectralNorm, WeightNorm)
    found = [Hooked(layer, hook) for hook in layer._forward_pre_hooks.values() if isinstance(hook, kinds)]
    return {name: one for one in found for name in one.originals}


class InUse:
    """The parameters that a module's layers use; pruned entries count as nothing."""

    def __init__(self, module: nn.Module | None = None) -> None:
        layers = () if module is None else module.modules()
        found = {id(one.largest): one for layer in layers for one in hooked(layer).values()}
        self._pruned = {key: one for key, one in found.items() if one.is_pruned}

    def __call__(self, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        """Of a tensor of a parameter's shape, such as its gradient."""
        computation = self._pruned.get(id(parameter))
        return tensor if computation is None else computation(tensor)
