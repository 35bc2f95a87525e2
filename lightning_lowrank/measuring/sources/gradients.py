"""Gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lowrank.measuring.parameter_source import ParameterSource, attempt, weights
from lightning_lowrank.measuring.source import Reading, Step
from lightning_lowrank.models.sites import Site


@dataclass(kw_only=True)
class Gradients(ParameterSource):
    """Gradients as the optimizer gets them, before clipping: synchronised, unscaled, accumulated.

    A LoRA pair is read as `B dA + dB A`, the change of the product along its gradients. A sparse gradient is read
    through its rows.
    """

    name = "gradient"
    of_changes = True

    def gradients_final(self, step: Step) -> list[Reading]:
        """The gradients; a site without any is not read."""
        return [gradient(site, step.scale) for site in self.sites if step.owns(site) and self.reads(site)]

    def reads(self, site: Site) -> bool:
        """Whether something is trained."""
        return any(p.requires_grad for p in site.parameters)


def gradient(site: Site, scale: Tensor | None) -> Reading:
    """The gradient of a site's matrices, without what a GradScaler multiplied it by."""
    count = 0 if site.linear else len(site.parameters)

    def made(*parts: Tensor) -> Tensor:
        matrices = site.tangent(parts[count:], parts[:count])
        # A float32 scale of no dimension would leave half precision as it is, where what is divided underflows.
        return matrices if scale is None else matrices.to(torch.promote_types(matrices.dtype, scale.dtype)) / scale

    values = site.parameters if count else ()
    parts = attempt(lambda: _parts(site, values))
    return Reading(site.labels, site.shape, parts, made, (*values, *site.parameters), weight=weights(site))


def _parts(site: Site, values: Sequence[Tensor]) -> list[Tensor]:
    if all(p.grad is None for p in site.parameters):
        return []
    return [*values, *(torch.zeros_like(p) if p.grad is None else _dense(p.grad) for p in site.parameters)]


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor
