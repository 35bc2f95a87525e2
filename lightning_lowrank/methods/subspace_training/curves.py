"""Curves of `SubspaceTraining`: how far weights have moved, and along how many directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Numbers, NumberSource, Quantity, led_by
from lightning_lowrank.methods.subspace_training.act import Subspaces
from lightning_lowrank.methods.subspace_training.layers import Place, places
from lightning_lowrank.models.training import Training

CORE = ("subspace_update_norm", "subspace_num_directions_used", "subspace_num_coefficients")
PER_SITE = (("update_norm", "1"), ("num_directions_used", "directions"))


class SubspaceNumbers(NumberSource):
    """Norms and participation ratios of coefficients.

    Args:
        act: The act that has the coefficients.
    """

    name = "subspace"
    of_parameters = True

    def __init__(self, act: Subspaces) -> None:
        self._act = act
        sites = [Quantity(f"subspace_{name}", unit, per_site=True) for name, unit in PER_SITE]
        self.quantities = led_by(CORE, [*sites, Quantity("subspace_num_coefficients", "1")])

    def plan(self, training: Training) -> None:
        """Read the weights that have directions."""

    def labels(self) -> list[str]:
        """One label for each weight, and one for the whole model."""
        return [WHOLE_MODEL, *(place.name for place in self._places())]

    @torch.no_grad()
    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of the current coefficients."""
        found = self._places()
        count = sum(place.holder.coefficients.numel() for place in found)
        whole = Numbers(WHOLE_MODEL, {"subspace_num_coefficients": torch.tensor(float(count))})
        return [whole, *(Numbers(place.name, _of_place(place)) for place in found)]

    def detach(self) -> None:
        """There is nothing to drop."""

    def _places(self) -> list[Place]:
        return [] if self._act.module is None else places(self._act.module)


def _of_place(place: Place) -> dict[str, Tensor]:
    weight, coefficients = place.weight.detach(), place.holder.coefficients.detach()
    dtype = torch.promote_types(coefficients.dtype, working_dtype(coefficients.device))
    energies, tiny = coefficients.to(dtype).square(), torch.finfo(dtype).tiny
    norm = weight.to(dtype).square().sum().sqrt()
    return {
        "subspace_update_norm": energies.sum().sqrt() / norm.clamp(min=tiny),
        "subspace_num_directions_used": energies.sum().square() / energies.square().sum().clamp(min=tiny),
    }
