"""A weight matrix without structure: the nulls for multifractal statistics.

Shape letters:  M rows, N columns of a matrix
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor


def shuffled(weight: Num[Tensor, "M N"], *, generator: torch.Generator) -> Num[Tensor, "M N"]:
    """The same entries in random places: only their distribution remains, which includes growth of the norm."""
    order = torch.randperm(weight.numel(), generator=generator, device=generator.device).to(weight.device)
    return weight.reshape(-1)[order].view(weight.shape)


def gaussian_like(weight: Float[Tensor, "M N"], *, generator: torch.Generator) -> Float[Tensor, "M N"]:
    """Independent Gaussian entries with the same mean and variance."""
    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device=generator.device).to(
        weight.device
    )
    return weight.mean() + weight.std() * noise
