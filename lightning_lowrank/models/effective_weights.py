"""Weights that are computed from several parameters: LoRA pairs, and those under `torch.nn.utils.parametrize`.

Shape letters:  M rows, N columns of a weight   R rank of a LoRA pair
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList

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


def computed(parametrization: ParametrizationList, values: Sequence[Tensor] = ()) -> Tensor:
    """The weight as the layer would have it in evaluation, at values of its originals; at those of now unless given."""
    given = dict(zip(_originals(parametrization), values, strict=True)) if values else {}
    with undisturbed(parametrization) as buffers:
        weight: Tensor = functional_call(parametrization, {**buffers, **given}, ())
        return weight.detach()


def pushed_forward(parametrization: ParametrizationList, values: Sequence[Tensor], changes: Sequence[Tensor]) -> Tensor:
    """Change of the weight to first order in changes of its originals."""
    names = _originals(parametrization)
    with undisturbed(parametrization) as buffers:

        def weight(*values: Tensor) -> Tensor:
            return functional_call(parametrization, {**buffers, **dict(zip(names, values, strict=True))}, ())  # type: ignore[no-any-return]

        # Not torch.func.jvp: its first call compiles TorchScript, with a deprecation warning that is not the user's.
        _, change = torch.autograd.functional.jvp(
            weight, tuple(v.detach() for v in values), tuple(c.detach() for c in changes)
        )
        return change  # type: ignore[no-any-return]


def _originals(parametrization: ParametrizationList) -> list[str]:
    """Names of the parameters that the weight is computed from."""
    return [name for name, parameter in parametrization._parameters.items() if parameter is not None]


def computed_shape(parametrization: ParametrizationList) -> torch.Size:
    """Shape of the weight; computed once, since a parametrization may be expensive."""
    known = _SHAPES.get(parametrization)
    if known is None or known[0] != len(parametrization):
        known = _SHAPES[parametrization] = (len(parametrization), computed(parametrization).shape)
    return known[1]
