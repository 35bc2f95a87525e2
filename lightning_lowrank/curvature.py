"""One measurement of curvature: what is asked of each operator of a loss, and how much work goes into it.

Shape letters:  P entries of all parameters   L parameters   k directions
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank import statistics, traces
from lightning_lowrank.eigenspaces import Eigenpairs, layer_energies, overlap, rayleigh_quotient, top_eigenpairs
from lightning_lowrank.loss_operators import LossOperators
from lightning_lowrank.operators import Layout, Operator, preconditioned, symmetry_defect

# Largest symmetry defect of a product that is believed: rounding in bfloat16 makes a tenth of it, in float32 a thousandth of that.
VALID = 0.05
# Products for the one eigenvalue that is held against the edge of stability.
EDGE = 6


@dataclass(frozen=True)
class Effort:
    """How much work goes into each operator.

    Attributes:
        every: Cadence unless one is given.
        further: Products for the top, beyond one for each direction.
        lowest: Smallest eigenvalues that are followed.
        probes: Random vectors; none where no more than batch sharpness is measured.
        steps: Products with the Krylov space of each.
    """

    every: int
    further: int = 0
    lowest: int = 0
    probes: int = 0
    steps: int = 0


# Seven products more than directions follow five that have moved. Two steps are enough for the trace and the trace of the square; the
# quadrature of an indefinite operator takes 40.
EFFORTS = {
    "light": Effort(50),
    "standard": Effort(500, further=7, probes=3, steps=2),
    "full": Effort(5000, further=30, lowest=1, probes=3, steps=40),
}


@dataclass
class Found:
    """Numbers with their errors, of the whole model and per parameter."""

    values: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Float[Tensor, " L"]] = field(default_factory=dict)
    layer_errors: dict[str, Float[Tensor, " L"]] = field(default_factory=dict)

    def note(self, name: str, estimate: traces.Estimate) -> None:
        """Keep a number and its error."""
        self.values[name], self.errors[name] = estimate.value, estimate.error

    def note_layers(self, name: str, estimate: traces.Estimate) -> None:
        """The same of each parameter."""
        self.layers[name], self.layer_errors[name] = estimate.value, estimate.error


class Curvatures:
    """What is followed from one measurement to the next.

    Args:
        effort: How much work goes into each operator.
        top_k: Directions that are followed.

    Attributes:
        tops: The top eigenvectors of each operator, from the last measurement, and what is nearest to the edge under "edge".
        valid: 1 where the first products were symmetric, 0 where not, None before the first measurement.
    """

    def __init__(self, effort: Effort, top_k: int) -> None:
        self.effort, self.top_k = effort, top_k
        self.tops: dict[str, Float[Tensor, "_ P"]] = {}
        self.valid: Tensor | None = None

    def measure(self, loss: LossOperators, generator: torch.Generator) -> Found:
        """All that is asked for."""
        found = Found()
        for name, operator in loss.operators.items():
            if self.valid is None:
                found.values["curvature_symmetry_defect"] = defect = symmetry_defect(operator, generator)
                # What is no number says nothing of the samples to come.
                self.valid = torch.where(torch.isfinite(defect), (defect < VALID).to(defect), torch.nan)
            if name == "hessian":
                self._sharpness(operator, loss, found, generator)
            if self.effort.probes:
                self._of_operator(name, operator, loss, found, generator)
        return self._judged(found)

    def before(self, name: str, size: int) -> Float[Tensor, "_ P"] | None:
        """Eigenvectors of the last measurement, None where there was none of this size."""
        vectors = self.tops.get(name)
        return vectors if vectors is not None and vectors.shape[-1] == size else None

    def _sharpness(self, operator: Operator, loss: LossOperators, found: Found, generator: torch.Generator) -> None:
        """Along the gradient; and as the optimizer sees it, where 1 is the edge."""
        found.values["batch_sharpness"] = along = rayleigh_quotient(operator, loss.gradient)
        edge = loss.edge
        if edge is None:
            return
        even = edge.diagonal.max() == edge.diagonal.min()
        found.values["batch_sharpness_over_threshold"] = torch.where(even, edge.sign * along * edge.diagonal[0], torch.nan)
        if self.effort.probes:
            scaled = preconditioned(operator, edge.diagonal)
            signed = replace(scaled, multiply=lambda vector: edge.sign * scaled.multiply(vector))
            start, near = self.before("edge", operator.size), (loss.gradient * edge.diagonal.sqrt())[None]
            pairs = top_eigenpairs(signed, 1, start=start, further=near, num_products=EDGE, generator=generator)
            found.note("sharpness_over_threshold", traces.Estimate(pairs.values[0], pairs.residuals[0]))
            self.tops["edge"] = pairs.vectors

    def _of_operator(self, name: str, operator: Operator, loss: LossOperators, found: Found, generator: torch.Generator) -> None:
        """The ends of its spectrum, and sums over it."""
        effort, before = self.effort, self.before(name, operator.size)
        k = max(1, min(self.top_k, operator.size - effort.lowest))
        products = k + effort.lowest + effort.further
        near = loss.gradient[None]
        pairs = top_eigenpairs(operator, k, lowest=effort.lowest, start=before, further=near, num_products=products, generator=generator)
        for label, value, residual in zip(_labels(k, effort.lowest), pairs.values, pairs.residuals, strict=False):
            found.note(f"{name}_{label}", traces.Estimate(value, residual))
        top = pairs.vectors[:k]
        found.layers[f"{name}_top_share"] = layer_energies(top, loss.layout).mean(0)
        if before is not None:
            found.values[f"{name}_eigenspace_overlap"] = overlap(top, before[:k])
        self.tops[name] = top
        self._sums(name, operator, pairs, loss.layout, found, generator)

    def _sums(self, name: str, operator: Operator, known: Eigenpairs, layout: Layout, found: Found, generator: torch.Generator) -> None:
        probes, steps = self.effort.probes, self.effort.steps
        whole = traces.spectral_estimate(operator, known=known, num_probes=probes, steps=steps, generator=generator, layout=layout)
        found.note(f"{name}_trace", traces.debiased(traces.trace, whole.spectrum))
        found.note(f"{name}_squared_norm", traces.trace_of_square(whole))
        found.note(f"{name}_participation_ratio", traces.participation_ratio(whole))
        found.note_layers(f"{name}_layer_trace", traces.sample_mean(whole.layer_traces))
        found.note_layers(f"{name}_layer_squared_norm", traces.sample_mean(whole.layer_squares))
        if self.effort.lowest:
            for label, formula in DEEP.items():
                found.note(f"{name}_{label}", traces.debiased(formula, whole.spectrum))

    def _judged(self, found: Found) -> Found:
        """Everything is NaN where the first products were not symmetric, so that nothing is believed."""
        if self.valid is not None:
            for numbers in (found.values, found.layers):
                for name, value in numbers.items():
                    if name != "curvature_symmetry_defect":
                        numbers[name] = torch.where(self.valid != 0, value, torch.nan)
            found.values["curvature_valid"] = self.valid
        return found


DEEP: dict[str, Callable[..., Tensor]] = {
    "effective_rank_energy": statistics.effective_rank_energy,
    "energy_rank": partial(statistics.energy_rank, epsilon=0.1),
    "negative_mass": traces.negative_mass,
}


def names(operators: Sequence[str], effort: Effort, top_k: int) -> dict[str, tuple[bool, bool]]:
    """Everything that is found, and of each whether it is one per parameter, and whether it has an error."""
    known: dict[str, tuple[bool, bool]] = {}
    if operators:
        known |= dict.fromkeys(("curvature_valid", "curvature_symmetry_defect"), (False, False))
    if "hessian" in operators:
        known |= dict.fromkeys(("batch_sharpness", "batch_sharpness_over_threshold"), (False, False))
        known |= dict.fromkeys(["sharpness_over_threshold"] * bool(effort.probes), (False, True))
    for name in operators if effort.probes else ():
        sums = ["trace", "squared_norm", "participation_ratio", *(DEEP if effort.lowest else ())]
        known |= dict.fromkeys([f"{name}_{label}" for label in (*_labels(top_k, effort.lowest), *sums)], (False, True))
        known[f"{name}_eigenspace_overlap"] = (False, False)
        known[f"{name}_top_share"] = (True, False)
        known |= dict.fromkeys([f"{name}_{label}" for label in ("layer_trace", "layer_squared_norm")], (True, True))
    return known


def _labels(top_k: int, lowest: int) -> list[str]:
    return ["lambda_max", *(f"lambda_{i}" for i in range(2, top_k + 1)), *["lambda_min"] * lowest]
