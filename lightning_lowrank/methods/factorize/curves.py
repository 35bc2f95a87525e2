"""Curves of `LowRankFactorize`: the change of the products in each step, and the orthogonality of the factors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import Spectrum, full_precision
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Numbers, NumberSource, Quantity, led_by
from lightning_lowrank.measuring.source import Reading, Step
from lightning_lowrank.methods.factorize.act import Factorization
from lightning_lowrank.methods.factorize.conversion import size
from lightning_lowrank.methods.factorize.factors import (
    Factors,
    change_norm,
    orthogonality_gap,
    product_spectrum,
)
from lightning_lowrank.methods.factorize.layers import Place, places
from lightning_lowrank.models.training import Training
from lightning_lowrank.statistics.effective_rank import effective_rank
from lightning_lowrank.statistics.stable_rank import stable_rank

CORE = ("factorize_update_norm", "factorize_orthogonality_gap", "factorize_num_parameters")
PER_SITE = (
    ("update_norm", "1"),
    ("orthogonality_gap", "1"),
    ("rank", "directions"),
    ("stable_rank", "directions"),
    ("effective_rank", "directions"),
)


class FactorNumbers(NumberSource):
    """Spectra of products and of their change in one step, from small cores.

    Args:
        act: The act that has the factors.
    """

    name = "factorize"
    of_parameters = True

    def __init__(self, act: Factorization) -> None:
        self._act = act
        sites = [Quantity(f"factorize_{name}", unit, per_site=True) for name, unit in PER_SITE]
        self.quantities = led_by(CORE, [*sites, Quantity("factorize_num_parameters", "1")])
        self._before: dict[str, Factors] = {}
        self._norms: dict[str, Tensor] = {}

    def plan(self, training: Training) -> None:
        """Read the factorized weights."""

    def labels(self) -> list[str]:
        """One label for each weight, and one for the whole model."""
        return [WHOLE_MODEL, *(place.name for place in self._places())]

    def gradients_final(self, step: Step) -> list[Reading]:
        """Keep the factors."""
        for place in self._places():
            if any(id(p) in step.parameters for p in place.parameters):
                self._before[place.name] = place.factors.copied()
        return []

    def step_done(self, step: Step) -> list[Reading]:
        """Measure the change of the step."""
        for place in self._places():
            before = self._before.pop(place.name, None)
            if before is not None:
                with full_precision(before.left.device):
                    self._norms[place.name] = change_norm(before, place.factors)
        return []

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of the step and of the current factors."""
        norms, self._norms = self._norms, {}
        assert self._act.module is not None
        whole = torch.tensor(float(size(self._act.module)[0]), dtype=torch.float64)
        found = [Numbers(WHOLE_MODEL, {"factorize_num_parameters": whole})]
        for place in self._places():
            with full_precision(place.parameters[0].device):
                values = _of_place(place) | ({"update_norm": norms[place.name]} if place.name in norms else {})
            found.append(Numbers(place.name, {f"factorize_{name}": value for name, value in values.items()}))
        return found

    def detach(self) -> None:
        """Drop an unfinished sample."""
        self._before, self._norms = {}, {}

    def _places(self) -> list[Place]:
        return [] if self._act.module is None else places(self._act.module)


def _of_place(place: Place) -> dict[str, Tensor]:
    factors = place.factors
    values = product_spectrum(factors)
    shape = (len(factors.left), factors.right.shape[1])
    spectrum = Spectrum(values, torch.ones_like(values), shape)
    errors = torch.stack([orthogonality_gap(factors.left), orthogonality_gap(factors.right.mT)])
    return {
        "rank": values.new_tensor(float(len(values))),
        "stable_rank": stable_rank(spectrum),
        "effective_rank": effective_rank(spectrum),
        "orthogonality_gap": errors.amax(),
    }
