"""Gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lowrank.sites import Site
from lightning_lowrank.sources.source import ParameterSource, Reading, Step


@dataclass(kw_only=True)
class Gradients(ParameterSource):
    """Gradients as the optimizer gets them, before clipping: synchronised, unscaled, accumulated.

    A LoRA pair is read as `B dA + dB A`, what its gradients do to the product. A sparse gradient is read through the rows it has.
    """

    name = "gradient"
    of_changes = True

    def gradients_final(self, step: Step) -> list[Reading]:
        """The gradients of the parameters that have one."""
        present = [s for s in self.sites if step.owns(s) and self.reads(s) and any(p.grad is not None for p in s.parameters)]
        return [Reading(site.labels, value, site) for site, value in self.each(present, lambda site: gradient(site, step.scale))]

    def reads(self, site: Site) -> bool:
        """Where something is trained."""
        return any(p.requires_grad for p in site.parameters)


def gradient(site: Site, scale: Tensor | None) -> Tensor:
    """The gradient of a site's matrices, without what a GradScaler multiplied it by."""
    matrices = site.tangent([None if p.grad is None else _dense(p.grad) for p in site.parameters])
    # A float32 scale of no dimension would leave half precision as it is, where what is divided underflows.
    return matrices if scale is None else matrices.to(torch.promote_types(matrices.dtype, scale.dtype)) / scale


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor
