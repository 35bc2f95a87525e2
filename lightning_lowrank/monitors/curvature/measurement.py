"""One measurement of curvature: what is asked of each operator of a loss, and how much work goes into it.

Shape letters:  P entries of all parameters   L parameters   k directions   n random vectors   G cells of a density
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank import statistics
from lightning_lowrank.maths.operators import traces
from lightning_lowrank.maths.operators.eigenspaces import (
    Eigenpairs,
    layer_energies,
    of_directions,
    overlap,
    rayleigh_quotient,
    sines,
    top_eigenpairs,
    widened,
)
from lightning_lowrank.maths.operators.estimates import Estimate, Found
from lightning_lowrank.maths.operators.operators import Operator, preconditioned
from lightning_lowrank.maths.spectra.spectrum import lengths_of
from lightning_lowrank.measuring.number_source import Quantity, refuse_top_k
from lightning_lowrank.monitors.curvature.loss_operators import OPERATORS, LossOperators
from lightning_lowrank.monitors.curvature.self_check import VALID, is_resolved, is_wrong, symmetry_defect
from lightning_lowrank.monitors.curvature.stability import Threshold
from lightning_lowrank.statistics.registry import find

# Cells of a density, and what is known of each: its middle, the curve there and its error, how many eigenvalues are in
# it.
CELLS = tuple(map(float, range(128)))
DENSITY = ("eigenvalue", "density", "density_error", "density_counts")
# Products for the one eigenvalue that is held against the edge of stability.
EDGE = 6
# Tells the seed of the random vectors from that of the start vectors.
SIGNS = 0x51675


@dataclass(frozen=True)
class CurvatureEffort:
    """How much work goes into each operator.

    Attributes:
        every: Cadence unless one is given.
        further: Products for the top, beyond one for each direction.
        following: The same of every operator but the first, whose directions the search then starts from.
        wider: Products with what the random vectors have seen and the space of the others lacks.
        lowest: Smallest eigenvalues that are followed.
        probes: Random vectors; none where no more than batch sharpness is measured.
        steps: Products with the Krylov space of each.
    """

    every: int
    further: int = 0
    following: int = 0
    wider: int = 0
    lowest: int = 0
    probes: int = 0
    steps: int = 0


# At these cadences a sample takes at most 5 % of the time. Seven products more than directions follow five that have
# moved, four more where another operator's directions are the start. One step is enough for the trace and the trace of
# the square; the quadrature of an indefinite operator takes 40.
EFFORTS = {
    "light": CurvatureEffort(100),
    "standard": CurvatureEffort(2000, further=7, following=4, wider=1, probes=5, steps=1),
    "full": CurvatureEffort(30000, further=30, following=30, wider=1, lowest=1, probes=5, steps=40),
}


@dataclass(frozen=True)
class Probes:
    """Random vectors, the same for all operators, so that what two have in common is not left to chance twice.

    Attributes:
        signs: The vectors.
        images: Products of each operator with them.
    """

    signs: Float[Tensor, "n P"]
    images: Mapping[str, Float[Tensor, "n P"]]


class Curvatures:
    """State that is kept from one measurement to the next.

    Args:
        effort: How much work goes into each operator.
        top_k: Directions that are followed.

    Attributes:
        tops: The top eigenvectors of each operator, from the last measurement, and what is nearest to the edge under
            "edge".
        sines: How far those of each operator may be from the eigenvectors, one number a direction.
        valid: 1 where the first products were what they should be, 0 where not, None before the first measurement.
        resolved: Whether the numbers of the last measurement are far from the smallest that the dtype has.
    """

    def __init__(self, effort: CurvatureEffort, top_k: int) -> None:
        self.effort, self.top_k = effort, top_k
        self.tops: dict[str, Float[Tensor, "_ P"]] = {}
        self.sines: dict[str, Float[Tensor, " _"]] = {}
        self.valid: Tensor | None = None
        self.resolved: Tensor | None = None
        self._lead: Float[Tensor, "_ P"] | None = None

    def measure(self, loss: LossOperators, generator: torch.Generator) -> Found:
        """All that is asked for."""
        found, sums = Found(), dict[str, traces.SpectralEstimate]()
        self.resolved = is_resolved(loss.loss) & is_resolved(loss.gradient)
        probes = self._probes(loss, generator) if self.effort.probes and loss.operators else None
        for name, operator in loss.operators.items():
            if self.valid is None:
                found.values["curvature_symmetry_defect"] = defect = symmetry_defect(
                    operator, torch.Generator(operator.device).manual_seed(0)
                )
                # What is no number says nothing of the samples to come.
                self.valid = torch.where(torch.isfinite(defect), (defect < VALID).to(defect), torch.nan)
            if name == "hessian":
                self._sharpness(operator, loss, found, generator)
            if probes is not None:
                sums[name] = self._of_operator(name, loss, probes, found, generator)
        if sums.keys() >= RESIDUAL:
            _residual(sums["hessian"], sums["gauss_newton"], found)
        self._lead = None
        return found

    def hold(self, found: Found, defect: Estimate) -> None:
        """Believe nothing from now on if a product with the Hessian is not the slope of the gradient."""
        assert self.valid is not None
        found.note("curvature_difference_defect", defect)
        self.valid = torch.where(is_wrong(defect) > 0, 0.0, self.valid)

    def before(self, name: str, size: int) -> Float[Tensor, "_ P"] | None:
        """Eigenvectors of the last measurement, None where there was none of this size."""
        vectors = self.tops.get(name)
        return vectors if vectors is not None and vectors.shape[-1] == size else None

    def off(self, name: str, vectors: Float[Tensor, "k P"]) -> Float[Tensor, " k"]:
        """The sines of those eigenvectors; NaN where an older checkpoint has none."""
        found = self.sines.get(name)
        return torch.full_like(vectors[:, 0], torch.nan) if found is None else found

    def _sharpness(self, operator: Operator, loss: LossOperators, found: Found, generator: torch.Generator) -> None:
        """Along the gradient; and as the optimizer sees it, where 1 is the edge."""
        found.values["batch_sharpness"] = along = rayleigh_quotient(operator, loss.gradient)
        edge = loss.edge
        if edge is None:
            return
        even = edge.diagonal.max() == edge.diagonal.min()  # with adaptive rates, too, as long as none has adapted
        found.values["batch_sharpness_over_threshold"] = torch.where(
            even, edge.sign * along * edge.diagonal[0], torch.nan
        )
        if self.effort.probes and not edge.is_even:
            scaled = preconditioned(operator, edge.diagonal)
            signed = replace(scaled, multiply=lambda vector: edge.sign * scaled.multiply(vector))
            start, near = self.before("edge", operator.size), (loss.gradient * edge.diagonal.sqrt())[None]
            pairs = top_eigenpairs(signed, 1, start=start, further=near, num_products=EDGE, generator=generator)
            found.note("sharpness_over_threshold", Estimate(pairs.values[0], pairs.errors[0]))
            self.tops["edge"] = pairs.vectors

    def _probes(self, loss: LossOperators, generator: torch.Generator) -> Probes:
        """Drawn apart from what the searches draw, and multiplied with all operators at once, which is cheaper."""
        operator = next(iter(loss.operators.values()))
        draw = torch.Generator(operator.device).manual_seed(generator.initial_seed() ^ SIGNS)
        signs = traces.random_signs(operator, self.effort.probes, draw)
        return Probes(signs, loss.products(signs))

    def _of_operator(
        self, name: str, loss: LossOperators, probes: Probes, found: Found, generator: torch.Generator
    ) -> traces.SpectralEstimate:
        """The ends of its spectrum, and sums over it."""
        operator = loss.operators[name]
        effort, before = self.effort, self.before(name, operator.size)
        k = max(1, min(self.top_k, operator.size - effort.lowest))
        leads = name == next(iter(loss.operators))
        # Curvatures of one loss have much of their top in common.
        start = before if leads else self._lead
        options: dict[str, Any] = {"lowest": effort.lowest, "start": start, "further": loss.gradient[None]}
        products = k + effort.lowest + (effort.further if leads else effort.following)
        pairs = top_eigenpairs(operator, k, **options, num_products=products, generator=generator)
        if leads:
            self._lead = pairs.vectors[:k]
        # The pairs are found without a look at the random vectors, for the sums to have no bias: those of the other
        # operators, too, which have the same random vectors and begin where the first ended. The rest of the space
        # is another one next time: with it taken out, sums of a batch that stays would not compare.
        sums = self._sums(name, loss, pairs, probes, found)
        pairs = widened(operator, pairs, sums.images, lowest=effort.lowest, num_products=effort.wider)
        for label, value, error in zip(_labels(k, effort.lowest), pairs.values, pairs.errors, strict=False):
            found.note(f"{name}_{label}", Estimate(value, error))
        if name == "hessian" and loss.edge is not None and loss.edge.is_even:
            _even_edge(loss.edge, pairs, found)
        top, off = pairs.vectors[:k], sines(pairs, k)
        found.note_layers(f"{name}_top_share", of_directions(layer_energies(top, loss.layout).mean(0), off))
        if before is not None:
            then = self.off(name, before)
            found.note(f"{name}_eigenspace_overlap", of_directions(overlap(top, before[:k]), off, then))
        self.tops[name], self.sines[name] = top, off
        return sums

    def _sums(
        self, name: str, loss: LossOperators, known: Eigenpairs, probes: Probes, found: Found
    ) -> traces.SpectralEstimate:
        options: dict[str, Any] = {"known": known, "steps": self.effort.steps, "layout": loss.layout}
        whole = traces.spectral_estimate(loss.operators[name], probes.signs, images=probes.images[name], **options)
        found.note(f"{name}_trace", traces.debiased(traces.trace, whole.spectrum))
        found.note(f"{name}_squared_norm", traces.trace_of_square(whole))
        if _knows_magnitudes(name, self.effort):
            ratio = traces.participation_ratio(whole, positive=name != "hessian")
            found.note(f"{name}_participation_ratio", ratio)
        found.note_layers(f"{name}_layer_trace", traces.sample_mean(whole.layer_traces))
        found.note_layers(f"{name}_layer_squared_norm", traces.sample_mean(whole.layer_squares))
        if self.effort.lowest:
            for label, formula in DEEP.items():
                found.note(f"{name}_{label}", traces.debiased(formula, whole.spectrum))
            density = traces.density(whole.spectrum, num_cells=len(CELLS))
            found.curves |= {f"{name}_{label}": row for label, row in zip(DENSITY, vars(density).values(), strict=True)}
        return whole

    def judge(self, found: Found) -> None:
        """Everything is NaN where the first products were wrong, or the loss too small, so that nothing is believed."""
        if self.valid is not None:
            valid = self.valid if self.resolved is None else torch.where(self.resolved, self.valid, 0.0)
            for numbers in (found.values, found.layers, found.curves):
                for name, value in numbers.items():
                    if not name.endswith("_defect"):
                        numbers[name] = torch.where(valid != 0, value, torch.nan)
            found.values["curvature_valid"] = valid


DEEP: dict[str, Callable[..., Tensor]] = {
    "effective_rank_energy": statistics.effective_rank_energy,
    "energy_rank": find("energy_rank_0.1"),
    "negative_mass": traces.negative_mass,
}


def _even_edge(edge: Threshold, pairs: Eigenpairs, found: Found) -> None:
    """Where all weights are stepped alike the edge is one of the Hessian's own."""
    scale = edge.diagonal[0]
    found.note("sharpness_over_threshold", Estimate(scale * pairs.values[0], scale * pairs.errors[0]))


def _residual(hessian: traces.SpectralEstimate, gauss_newton: traces.SpectralEstimate, found: Found) -> None:
    """What the Hessian has beside the Gauss-Newton matrix: curvature of the model itself, weighted by what is left to
    learn. Both have multiplied the same random vectors.
    """
    found.note("residual_trace", traces.sample_mean((hessian.layer_traces - gauss_newton.layer_traces).sum(-1)))
    squares = lengths_of(hessian.images - gauss_newton.images).to(hessian.layer_squares).square()
    found.note("residual_squared_norm", traces.sample_mean(squares))


def densities_of(operators: Sequence[str]) -> list[tuple[str, str]]:
    """Names of the curves of a density, and of the one that has the cells' middles for that which counts in cells."""
    return [
        (f"{name}_{label}", f"{name}_eigenvalue" if label == "density_counts" else "")
        for name in operators
        for label in DENSITY
    ]


# The operators whose difference is the residual.
RESIDUAL = {"hessian", "gauss_newton"}


def quantities(operators: Sequence[str], effort: CurvatureEffort, top_k: int) -> Iterator[Quantity]:
    """Everything that is found."""
    if operators:
        yield from (Quantity("curvature_valid"), Quantity("curvature_symmetry_defect"))
        yield Quantity("curvature_difference_defect", estimated=True)
    if "hessian" in operators:
        yield from (Quantity("batch_sharpness"), Quantity("batch_sharpness_over_threshold"))
    if not effort.probes:
        return
    if "hessian" in operators:
        yield Quantity("sharpness_over_threshold", estimated=True)
    for name in operators:
        ranks = ["participation_ratio"] * _knows_magnitudes(name, effort)
        sums = ["trace", "squared_norm", *ranks, *(DEEP if effort.lowest else ())]
        for label in (*_labels(top_k, effort.lowest), *sums):
            yield Quantity(f"{name}_{label}", estimated=True)
        yield Quantity(f"{name}_eigenspace_overlap", estimated=True)
        for label in ("top_share", "layer_trace", "layer_squared_norm"):
            yield Quantity(f"{name}_{label}", per_site=True, estimated=True)
    if set(operators) >= RESIDUAL:
        yield Quantity("residual_trace", estimated=True)
        yield Quantity("residual_squared_norm", estimated=True)


def refuse(detail: str, operators: Sequence[str], top_k: int) -> None:
    """Refuse options that cannot be measured.

    Raises:
        ValueError: An option is another word, or operators do not go with the detail.
    """
    unknown = [name for name in operators if name not in OPERATORS]
    if isinstance(operators, str) or unknown:
        raise ValueError(
            f"operators={operators!r} must be a list of some of {list(OPERATORS)}, or empty for critical sharpness only"
        )
    if detail not in EFFORTS:
        raise ValueError(f"level={detail!r} must be one of {list(EFFORTS)}")
    if detail == "light" and operators and "hessian" not in operators:
        raise ValueError(
            f"level='light' measures only the Hessian, which operators={list(operators)!r} does not include; use "
            "level='standard'"
        )
    refuse_top_k(top_k)


def _knows_magnitudes(name: str, effort: CurvatureEffort) -> bool:
    """Whether eigenvalues are summed by magnitude: where some are negative that takes the whole quadrature."""
    return name != "hessian" or effort.lowest > 0


def _labels(top_k: int, lowest: int) -> list[str]:
    return ["lambda_max", *(f"lambda_{i}" for i in range(2, top_k + 1)), *["lambda_min"] * lowest]
