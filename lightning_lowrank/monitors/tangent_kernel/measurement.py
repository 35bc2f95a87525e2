"""One measurement of the tangent kernel: what is asked of it, how much work goes into it, and what is kept for the
next.

Shape letters:  R rows of the model's outputs   C columns of them   L parameters   k modes   n size of a kernel   q
known directions
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.operators import traces
from lightning_lowrank.maths.operators.eigenspaces import Eigenpairs, top_eigenpairs
from lightning_lowrank.maths.operators.estimates import Estimate, Found
from lightning_lowrank.maths.operators.operators import Operator, dense
from lightning_lowrank.maths.operators.traces import SpectralEstimate
from lightning_lowrank.maths.spectra.sketch import estimate
from lightning_lowrank.measuring.number_source import Quantity
from lightning_lowrank.monitors.tangent_kernel import by_layer, estimates
from lightning_lowrank.monitors.tangent_kernel.kernels import (
    Kernel,
    KernelName,
    Known,
    LayerKernels,
    exact_kernel,
    kernel_operator,
    known_part,
    layer_kernels,
    modes_of,
    projections,
    sketched_kernel,
    spectrum_of_modes,
)
from lightning_lowrank.monitors.tangent_kernel.outputs import KernelOutputs
from lightning_lowrank.statistics.registry import find

# Pairs of products with the Jacobian, beyond which a kernel is estimated rather than formed: about what the estimates
# take.
EXACT = 128
# Gradients in memory at once, for the kernels of the parameters.
HELD = 4
# Directions in which class-summed kernels are known for comparisons.
COMPARED = 2
# Of the whole spectrum.
RANKS = {"effective_rank_energy": find("effective_rank_energy"), "energy_rank": find("energy_rank_0.1")}


@dataclass(frozen=True)
class KernelEffort:
    """How much work goes into a kernel.

    Attributes:
        top_k: Modes that are followed.
        num_projections: Of the parameters, from which sums and comparisons are estimated; also probes of the
            parameters' own kernels.
        further: Products for the top, beyond one for each mode.
        probes: Random vectors for sums over the spectrum and ranks; with fewer than 4 their errors would be without
            bounds.
        steps: Products with the Krylov space of each; with one there would be no squared norm.
    """

    top_k: int
    num_projections: int
    further: int = 4
    probes: int = 5
    steps: int = 6

    def __post_init__(self) -> None:
        assert self.steps > 1 and self.probes > 3


@dataclass(frozen=True)
class Reference:
    """A kernel to compare later ones with.

    Attributes:
        kernel: Of all parameters; what is known of it is known in the directions of the first one.
        layers: Of each parameter.
        parameters: Their names.
    """

    kernel: Kernel
    layers: LayerKernels
    parameters: tuple[str, ...]

    def fits(self, other: "Reference") -> bool:
        """Whether they are of the same rows, outputs and parameters, and found in the same way."""
        return self.parameters == other.parameters and self._shapes() == other._shapes()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, a number and names."""
        known = {field.name: getattr(part, field.name) for part in (self.kernel, self.layers) for field in fields(part)}
        return known | {"parameters": list(self.parameters)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], device: torch.device) -> "Reference":
        """Gathered back."""
        found: dict[str, Any] = {
            name: part.to(device) if isinstance(part, Tensor) else part for name, part in state.items()
        }
        kernel, layers = ({field.name: found[field.name] for field in fields(kind)} for kind in (Kernel, LayerKernels))
        return cls(Kernel(**kernel), LayerKernels(**layers), tuple(found["parameters"]))

    def _shapes(self) -> tuple[object, ...]:
        return self.kernel.basis.shape[1:], self.kernel.rest.shape, self.kernel.num_rows, self.layers.products.shape


@dataclass(frozen=True)
class Modes:
    """A spectrum and its top.

    Attributes:
        top: The modes that are followed.
        known: All that are known: everything where it is exact.
        spectrum: Of the whole; in its errors too. None where projections tell more of it.
        exact: Whether nothing is estimated.
    """

    top: Eigenpairs
    known: Eigenpairs
    spectrum: SpectralEstimate | None
    exact: bool


class TangentKernels:
    """State that is kept from one measurement to the next.

    Memory: two references of `num_projections` times the outputs each, `top_k` modes, and no more than that for the
    number of parameters.

    Args:
        kernel: Which one.
        effort: How much work goes into it.
        seed: Of the projections, the same at every measurement.

    Attributes:
        tops: The top modes of each operator, from the last measurement.
        first: The kernel at the first measurement.
        last: That of the last.
        directions: In which each is known exactly, for comparisons.
        exact: Whether the last was formed rather than estimated.
    """

    def __init__(self, kernel: KernelName, effort: KernelEffort, seed: int) -> None:
        self.kernel, self.effort, self.seed = kernel, effort, seed
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.tops: dict[str, Tensor] = {}
        self.first: Reference | None = None
        self.last: Reference | None = None
        self.directions: Float[Tensor, "q n"] | None = None
        self.exact: bool | None = None

    def measure(
        self, outputs: KernelOutputs, rate: float | Tensor | None, steps: int, generator: torch.Generator
    ) -> Found:
        """All that is asked for.

        Args:
            rate: Learning rate of gradient descent; None where the optimizer is another.
            steps: Made so far, of each optimizer.
            generator: On the device of the outputs.
        """
        found, operator = Found(), kernel_operator(outputs.jacobian, self.kernel)
        modes = self._modes("ntk", operator, self._whole(outputs, operator), generator)
        self.exact = modes.exact
        kernel, compared = self._kernels(outputs, operator, modes)
        self._sizes("ntk", modes, found)
        if not modes.exact:
            found.note("ntk_trace", estimates.trace(kernel))
            found.note("ntk_squared_norm", estimates.squared_norm(kernel))
        if self.kernel == "class_summed":
            found.note("ntk_participation_ratio", estimates.participation_ratio(kernel))
        if modes.spectrum is None:
            # A product takes as many pairs as there are columns, a projection tells as much of all of them at once.
            for label, statistic in RANKS.items():
                found.note(f"ntk_{label}", estimates.rank(statistic, kernel, modes.known.space))
        found.note("ntk_condition", _condition(modes.top))
        if outputs.labels is not None:
            _of_labels(kernel, modes, outputs.labels, found)
        self._motion(outputs, compared, found)
        self._gauss_newton(outputs.gauss_newton, rate, steps, found, generator)
        return found

    def _whole(self, outputs: KernelOutputs, operator: Operator) -> Tensor | None:
        """The kernel, where it takes few products."""
        summed = by_layer.class_summed(outputs.jacobian, seed=self.seed) if self.kernel == "class_summed" else None
        rows, columns = outputs.shape
        pairs = rows if self.kernel == "sum_of_logits" else rows * columns
        return dense(operator) if summed is None and pairs <= EXACT else summed

    def _modes(self, name: str, operator: Operator, whole: Tensor | None, generator: torch.Generator) -> Modes:
        """The spectrum of an operator that is nowhere negative; exact where the whole of it is known."""
        effort, k = self.effort, min(self.effort.top_k, operator.size)
        if whole is not None:
            known = modes_of(whole)
            nothing = known.values.new_zeros(0, 0)
            spectrum = SpectralEstimate(spectrum_of_modes(known), known.values.new_zeros(()), nothing, nothing, nothing)
            return Modes(self._followed(name, known, k), known, spectrum, exact=True)
        start = self.tops.get(name)
        start = start if start is not None and start.shape[-1] == operator.size else None
        # One more than are followed, for the gap below these.
        options: dict[str, Any] = {"start": start, "num_products": k + effort.further, "earlier": True}
        known = top_eigenpairs(operator, min(k + 1, operator.size), **options, generator=generator)
        estimated = None
        if name != "ntk" or self.kernel != "class_summed":
            signs = traces.random_signs(operator, effort.probes, generator)
            estimated = traces.spectral_estimate(operator, signs, known=known.space, steps=effort.steps)
        return Modes(self._followed(name, known, k), known, estimated, exact=False)

    def _followed(self, name: str, known: Eigenpairs, k: int) -> Eigenpairs:
        ends = {name: getattr(known, name)[:k] for name in ("values", "vectors", "couplings", "errors", "before")}
        top = replace(known, **ends, earlier=None, whole=None)
        self.tops[name] = top.vectors
        return top

    def _kernels(self, outputs: KernelOutputs, operator: Operator, modes: Modes) -> tuple[Kernel, Kernel]:
        """The kernel as it is known best, and as it compares best with others: known in the same directions as they
        are.
        """
        if modes.exact:
            kernel = exact_kernel(modes.known, outputs.shape[0])
            return kernel, kernel
        known = known_part(operator, modes.known.space, further=self._further(outputs.labels))
        shared = self._shared(operator, modes.known)
        drawn = projections(outputs.jacobian, num=self.effort.num_projections, seed=self.seed)
        kernel, compared = (sketched_kernel(drawn, self.kernel, known=part) for part in (known, shared))
        return kernel, compared

    def _shared(self, operator: Operator, modes: Eigenpairs) -> Known:
        """What is known in the directions in which the first kernel was. Of the class-summed kernel these are the two
        that matter most: a product takes as long as two projections for each column, which tell of all columns.
        """
        if self.directions is not None and self.directions.shape[-1] == operator.size:
            return known_part(operator, further=self.directions)
        count = COMPARED if self.kernel == "class_summed" else len(modes.vectors)
        self.directions = modes.vectors[:count]
        return Known(self.directions, modes.images()[:count])

    def _further(self, labels: Float[Tensor, "R C"] | None) -> Float[Tensor, "2 n"] | None:
        """Directions in which a full kernel has to be known for its alignment with labels; others take as many products
        as columns.
        """
        if self.kernel != "full" or labels is None:
            return None
        return torch.stack([labels.flatten(), (labels - labels.mean(0)).flatten()])

    def _sizes(self, name: str, modes: Modes, found: Found) -> None:
        """Ends of a spectrum, and sums over it."""
        for label, value, error in zip(_labels(self.effort.top_k), modes.top.values, modes.top.errors, strict=False):
            found.note(f"{name}_{label}", Estimate(value, error))
        spectrum = modes.spectrum
        if spectrum is None:
            return
        sums = {
            "trace": traces.debiased(traces.trace, spectrum.spectrum),
            "squared_norm": traces.trace_of_square(spectrum),
        }
        for label, found_sum in (sums | {"participation_ratio": traces.participation_ratio(spectrum)}).items():
            found.note(f"{name}_{label}", found_sum)
        for label, statistic in RANKS.items():
            # Few steps do not resolve the tail: what half of them would have said otherwise is in this error.
            found.note(f"{name}_{label}", Estimate(*estimate(statistic, spectrum.spectrum)))

    def _motion(self, outputs: KernelOutputs, kernel: Kernel, found: Found) -> None:
        """How far the kernel has turned since the last measurement, and since the first."""
        probes = self.effort.num_projections
        layers = layer_kernels(
            outputs.jacobian, outputs.layout, self.kernel, num_probes=probes, seed=self.seed, held=HELD
        )
        now = Reference(kernel, layers, outputs.layout.names)
        found.note_layers("ntk_layer_share", estimates.layer_shares(layers))
        if self.first is None or self.last is None or not now.fits(self.first) or not now.fits(self.last):
            self.first = now
        else:
            rounding = outputs.rounding
            of_last, of_first = (estimates.velocity(kernel, before.kernel) for before in (self.last, self.first))
            of_layers = estimates.layer_velocities(layers, self.last.layers)
            found.note("ntk_velocity", estimates.blurred(of_last, rounding))
            found.note("ntk_distance_to_start", estimates.blurred(of_first, rounding))
            found.note_layers("ntk_layer_velocity", estimates.blurred(of_layers, rounding))
        self.last = now

    def _gauss_newton(
        self, operator: Operator, rate: float | Tensor | None, steps: int, found: Found, generator: torch.Generator
    ) -> None:
        """The same of the loss's own matrix, and what gradient descent would have learnt of it."""
        whole = dense(operator) if operator.size <= EXACT else None
        modes = self._modes("ntk_gauss_newton", operator, whole, generator)
        self._sizes("ntk_gauss_newton", modes, found)
        if rate is None:
            return
        constants = estimates.time_constants(modes.top, rate)
        for label, constant, error in zip(
            _labels(self.effort.top_k), constants, _relative(modes.top) * constants, strict=False
        ):
            found.note(
                f"ntk_{label.replace('lambda', 'time_constant')}".removesuffix("_max"), Estimate(constant, error)
            )
        time = rate * steps
        assert modes.spectrum is not None
        learnt = traces.debiased(lambda spectrum: estimates.num_learnt(spectrum, time), modes.spectrum.spectrum)
        found.note("ntk_modes_learnt", learnt)


def quantities(top_k: int) -> Iterator[Quantity]:
    """Everything that is found."""
    sums = ("trace", "squared_norm", "participation_ratio", "effective_rank_energy", "energy_rank")
    of_a_kernel = [f"{name}_{label}" for name in ("ntk", "ntk_gauss_newton") for label in (*_labels(top_k), *sums)]
    of_change = ["ntk_condition", "ntk_label_alignment", "ntk_centred_label_alignment"]
    of_change += ["ntk_velocity", "ntk_distance_to_start"]
    of_modes = [
        *learnt_by_descent(top_k),
        "ntk_label_energy_in_top",
        *(f"ntk_label_energy_{i}" for i in range(1, top_k + 1)),
    ]
    for name in (*of_a_kernel, *of_change, *of_modes):
        yield Quantity(name, estimated=True)
    yield Quantity("ntk_label_energy_in_top_chance")
    for name in ("ntk_layer_share", "ntk_layer_velocity"):
        yield Quantity(name, per_site=True, estimated=True)


def learnt_by_descent(top_k: int) -> list[str]:
    """Numbers that have a meaning only for gradient descent."""
    return ["ntk_time_constant", *(f"ntk_time_constant_{i}" for i in range(2, top_k + 1)), "ntk_modes_learnt"]


def _of_labels(kernel: Kernel, modes: Modes, labels: Float[Tensor, "R C"], found: Found) -> None:
    """What the kernel, and its modes, have in common with the labels."""
    found.note("ntk_label_alignment", estimates.alignment(kernel, labels))
    found.note("ntk_centred_label_alignment", estimates.alignment(kernel, labels, centred=True))
    each, together = estimates.label_energies(modes.known, labels, len(modes.top.values))
    for i, (energy, error) in enumerate(zip(each.value, each.error, strict=True), 1):
        found.note(f"ntk_label_energy_{i}", Estimate(energy, error))
    found.note("ntk_label_energy_in_top", together)
    found.values["ntk_label_energy_in_top_chance"] = torch.full_like(
        together.value, len(modes.top.values) / modes.known.vectors.shape[-1]
    )


def _condition(top: Eigenpairs) -> Estimate:
    value, relative = estimates.condition(top), _relative(top)
    return Estimate(value, value * (relative[0].square() + relative[-1].square()).sqrt())


def _relative(top: Eigenpairs) -> Float[Tensor, " k"]:
    """Errors of the values beside them."""
    return top.errors / top.values.clamp(min=0)


def _labels(top_k: int) -> list[str]:
    return ["lambda_max", *(f"lambda_{i}" for i in range(2, top_k + 1))]
