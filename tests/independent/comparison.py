"""What each quantity is compared with and how near it has to be, or why there is nothing to compare it with."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache

import numpy as np

from tests.independent import (
    activations,
    anatomy,
    attention,
    concentration,
    coordinates,
    curvature,
    kernels,
    multifractal,
    ranks,
    routers,
    trajectory,
)
from tests.independent.multifractal import Drawn
from tests.independent.ranks import Found
from tests.independent.trainings import Run, run

REFERENCES = (
    *(
        ranks.expected,
        anatomy.expected,
        anatomy.dormant,
        activations.expected,
        routers.expected,
        coordinates.expected,
        attention.expected,
        concentration.expected,
    ),
    *(multifractal.expected, multifractal.network, curvature.expected, curvature.light, kernels.expected),
    trajectory.expected,
)


@dataclass(frozen=True)
class Claim:
    """How a quantity is compared.

    Attributes:
        reference: In words.
        tolerance: Of the deviation.
        unit: "relative": share of the reference. "absolute": as it is. "errors": in reported errors. "draws": in
            standard deviations of own draws.
        blank_from: The reported error from which on the number says nothing, and is NaN.
    """

    reference: str
    tolerance: float = 1e-5
    unit: str = "relative"
    blank_from: float = math.inf

    def deviation(self, value: float, truth: float | Drawn, error: float) -> float:
        """How far a logged number is from the reference, in the claim's unit; infinite where only one is a number."""
        if isinstance(truth, Drawn):
            slack = truth.deviation + (0.0 if math.isnan(error) else error) + ROUNDING * abs(truth.mean) + SMALLEST
            return abs(value - truth.mean) / slack if slack else 0.0 if value == truth.mean else math.inf
        if math.isnan(value) and error >= self.blank_from:
            return 0.0
        if math.isnan(value) or math.isnan(truth):
            return 0.0 if math.isnan(value) and math.isnan(truth) else math.inf
        distance = abs(value - truth)
        if self.unit == "errors":
            distance = max(0.0, distance - ROUNDING * abs(truth) - SMALLEST)
            return distance / error if error > 0 else 0.0 if distance == 0 else math.inf
        return distance if self.unit == "absolute" else distance / max(abs(truth), TINY)

    def __str__(self) -> str:
        units = {
            "relative": "",
            "absolute": " absolute",
            "errors": " reported errors",
            "draws": " standard deviations of the draws",
        }
        return f"{self.tolerance:g}{units[self.unit]}"


# Standard deviations of own draws.
OF_DRAWS = 4.0
# Float32 of the training, where the reference is in double precision; beside reported errors.
ROUNDING = 2e-3
SMALLEST = 1e-6
# Below it a number is 0 to float32.
TINY = 1e-7

DENSE = "eigenvalues of the dense matrix, by autograd in double precision"
SVD = "numpy's SVD of the recorded matrix"
DRAWN = "24 independent draws"

# The first pattern that fits counts.
CLAIMS: dict[str, Claim] = {
    "<summary>*": Claim("numpy over the single sites of the event file"),
    # RankMonitor
    "*schatten_quasi_norm_0.5": Claim(f"{SVD}; roots of values near the rounding of the Gram matrix", 1e-3),
    "*_weight_ratio": Claim("numpy's spectral norms of both"),
    "*_spectrum_drift": Claim(SVD, 1e-5, "absolute"),
    "*subspace_overlap*": Claim("principal angles from numpy's SVD", 1e-4),
    "*relative_*rank*": Claim(f"{SVD}; quantiles of Marchenko and Pastur's law by scipy's quadrature"),
    "*relative_*": Claim(f"{SVD}; quantiles of Marchenko and Pastur's law by scipy's quadrature"),
    "*marchenko_pastur_outliers": Claim(f"{SVD}; median of Marchenko and Pastur's law by scipy's quadrature"),
    "*tail_exponent*": Claim("Clauset's fit, one candidate at a time, in numpy", 1e-4),
    # GradientAnatomyMonitor
    "anatomy_deviation": Claim("the whole product of both sides, in numpy", 1e-5, "absolute"),
    "anatomy_spike_strength": Claim("numpy's eigenvalues, the exponent by scipy's root finder", 1e-5, "absolute"),
    "anatomy_bulk_decay": Claim("numpy's eigenvalues, the exponent by scipy's root finder", 1e-4),
    "anatomy_loss": Claim("the loss of a repeated step"),
    "anatomy_*_chance": Claim("the formula in numpy"),
    **dict.fromkeys(
        ("anatomy_residue", "anatomy_interpolant", "anatomy_spike*", "anatomy_bulk"),
        Claim(
            "projectors from numpy's SVDs of inputs and output gradients; block iteration mixes close directions",
            2e-3,
        ),
    ),
    "anatomy_*": Claim("numpy's SVDs of inputs and output gradients from plain hooks", 1e-4),
    "dormant_*": Claim("means of magnitudes from plain hooks"),
    "activation_write_defect": Claim("inputs and outputs of blocks from plain hooks, in numpy", 1e-5, "absolute"),
    "router_gate_stable_rank_chance": Claim("quantiles of Marchenko and Pastur's law by scipy's quadrature"),
    "coordinate_*": Claim("inputs from plain hooks times weights before and after the step, in numpy", 1e-4),
    "router_*": Claim("logits from plain hooks, tokens counted one by one; numpy's SVD of the gate"),
    "activation_*": Claim("inputs and outputs of blocks from plain hooks, in numpy; numpy's SVD of weights", 1e-4),
    # ConcentrationMonitor
    "concentration_*_gini*": Claim("all pairs of units, one by one", 1e-5, "absolute"),
    "concentration_*_matthew_slope": Claim("scipy's line through the logarithms", 1e-4),
    "concentration_*_rank_persistence": Claim("scipy's Spearman correlation", 1e-4),
    "concentration_mask_*": Claim("sets of the largest weights, sorted by numpy"),
    "concentration_weight_*": Claim("Lorenz curve and sums of sorted weights"),
    "concentration_*_count": Claim("counted by hand"),
    "concentration_head_importance": Claim("gates that multiply what the layer reads, by autograd", 1e-4),
    "concentration_*_gate_*": Claim("gates that multiply what the layer reads, by autograd; formulas in numpy", 1e-4),
    "concentration_*": Claim("sums of squares and SVDs in numpy; formulas in numpy", 1e-4),
    # AttentionMonitor
    "qk_update_*_chance": Claim(f"{DRAWN}: heads of Gaussian entries", OF_DRAWS, "draws"),
    "qk_update_*": Claim("numpy's SVD of the whole product of each head", 1e-4),
    "attention_*": Claim("probabilities in numpy, from the scores that softmax receives", 1e-4),
    # MultifractalMonitor
    "multifractal_*": Claim("sorting, counting and numpy's fitted lines"),
    "neuromfa_*_shuffled": Claim(f"{DRAWN}: shuffled entries", OF_DRAWS, "draws"),
    "neuromfa_*_gaussian": Claim(f"{DRAWN}: Gaussian entries", OF_DRAWS, "draws"),
    "neuromfa_*": Claim("the published recipe in loops, exact derivatives, numpy's fitted lines"),
    # CurvatureMonitor
    "*curvature_valid": Claim("1, because all products are correct in these models"),
    "*curvature_symmetry_defect": Claim("0, because the matrices are symmetric", 1e-4, "absolute"),
    "*curvature_difference_defect": Claim("0, because these losses are smooth at these weights", 0.02, "absolute"),
    "monte_carlo_fisher_*": Claim(f"{DRAWN} of the targets, dense matrices", OF_DRAWS, "draws"),
    "*batch_sharpness*": Claim("the dense Hessian along the gradient", 1e-3),
    "sharpness_over_threshold": Claim(f"{DENSE}, preconditioned; the edge from the optimizer's recursion", 3, "errors"),
    "critical_*": Claim("losses along the update on a grid, scipy's root finder", 3, "errors"),
    "*_eigenspace_overlap": Claim("eigenvectors of the dense matrices", 3, "errors", 1),
    "*_top_share": Claim("eigenvectors of the dense matrix", 3, "errors", 1),
    **dict.fromkeys(
        ("gradient_in_top", "update_in_top", "displacement_in_top"),
        Claim("eigenvectors of the dense matrix of the last sample, recorded moves", 3, "errors", 1),
    ),
    "in_top_chance": Claim("counted"),
    "hessian_*": Claim(DENSE, 3, "errors"),
    "gauss_newton_*": Claim(DENSE, 3, "errors"),
    "empirical_fisher_*": Claim(f"{DENSE}; gradients of single rows", 3, "errors"),
    "residual_*": Claim(DENSE, 3, "errors"),
    # TrajectorySubspace
    "trajectory_*_random_walk": Claim("covariance of a walk, entry by entry, and numpy's eigenvalues"),
    "trajectory_*": Claim("numpy's SVD of all recorded parameters, and sums of distances"),
    # NTKMonitor
    "ntk_label_energy_in_top_chance": Claim("counted"),
    "ntk_gauss_newton_*": Claim("eigenvalues from the whole Jacobian, by autograd in double precision", 3, "errors"),
    "ntk_*": Claim("the kernel from the whole Jacobian, by autograd in double precision", 3, "errors"),
    # RankMonitor, the rest
    "*": Claim(SVD),
}

# What has no reference here, by the name of the quantity (or of the tag, of what is none), and why.
REASONS: dict[str, str] = {
    "activation_branch_ratio": "has a reference in the models whose blocks have branches, GPT-2 and Llama",
    "activation_alignment*": "has a reference where one block's last weight feeds the next block's first, as in GPT-2",
    "*monte_carlo_fisher_eigenspace_overlap": "targets are drawn anew at each sample; other draws differ as much",
    "*_error": "does not describe the model; [another page](errors.md) says how often it covers the exact value",
    "lowrank/*_time_ms": "depends on the machine's clock",
    "lowrank/*_overhead_percent": "depends on the machine's clock; the benchmarks compare it with pairs of trainings",
    "lowrank/*_solver_calls": "counts calls of the package itself",
    "lowrank/*_bytes": "counts the memory of the package itself",
    "lowrank/*_failures": "counts failures; each of these runs asserts that there are none",
    "lowrank/*_skipped_steps": "these runs have no GradScaler",
    "lowrank/*_rows": "a count; the matrices with these rows are compared",
    "lowrank/*_replayed": "says whether the loss was replayed",
    "lowrank/ntk_*": "says how the kernel was computed",
    "lowrank/anatomy_num_outputs": "an argument",
    "concentration_*_reference": "needs the checkpoint of another run; `tests/monitors/concentration` has its oracle",
}
# What the module logs itself.
OF_THE_MODULE = ("validation loss", "epoch", "hp_metric")
SUMMARY = re.compile(r"(.*)_(min|median|max)")
ENDS = {"min": np.min, "median": np.median, "max": np.max}


@dataclass(frozen=True)
class Compared:
    """One number of a curve.

    Attributes:
        is_number: Whether both are numbers; else both are NaN, or one is.
    """

    quantity: str
    tag: str
    step: int
    value: float
    truth: float | Drawn
    deviation: float
    is_number: bool

    @property
    def is_near(self) -> bool:
        """Within the tolerance of the claim."""
        limit = OF_DRAWS if isinstance(self.truth, Drawn) else claim_of(self.quantity).tolerance
        return self.deviation <= limit

    @property
    def has_error(self) -> bool:
        """Whether it is a number whose deviation is in reported errors."""
        is_drawn = isinstance(self.truth, Drawn)
        return self.is_number and not is_drawn and claim_of(self.quantity).unit == "errors"


def claim_of(quantity: str) -> Claim:
    """The first that fits."""
    return next(claim for pattern, claim in CLAIMS.items() if fnmatch(quantity, pattern))


def reason_of(name: str) -> str | None:
    """Why there is no reference, None where there should be one."""
    return next((reason for pattern, reason in REASONS.items() if fnmatch(name, pattern)), None)


@dataclass(frozen=True)
class Comparison:
    """A run against all references.

    Attributes:
        unknown: Tags and quantities that have neither a reference nor a reason.
    """

    compared: list[Compared]
    unknown: list[str]


@cache
def references(name: str) -> Found:
    """What all quantities of a run should be."""
    found: Found = {}
    for reference in REFERENCES:
        found |= reference(run(name))
    return found


def comparison(run: Run) -> Comparison:
    """All tags of the event file."""
    found = references(run.name)
    compared, seen = [], set()
    for quantity, sites in found.items():
        tags = {site: f"{quantity}/{site}" if site else _tag(run, quantity) for site in sites}
        for site, truths in sites.items():
            compared += _of_curve(run, quantity, tags[site], truths)
        seen |= set(tags.values())
    summaries = list(_summaries(run, found))
    seen |= {one.tag for one in summaries} | set(OF_THE_MODULE)
    declared = {quantity for quantities in run.declared.values() for quantity in quantities}
    unasked = {quantity for quantity in declared - found.keys() if reason_of(quantity) is None}
    unknown = [quantity for quantity in unasked if _is_there(run, quantity)]
    # An optimizer that keeps no such moment leaves a blank curve.
    blank = {tag for tag, curve in run.logged.items() if all(math.isnan(value) for value in curve.values())}
    unknown += [tag for tag in run.logged if tag not in seen | blank and reason_of(_plain(tag)) is None]
    return Comparison([*compared, *summaries], sorted(unknown))


def _tag(run: Run, quantity: str) -> str:
    """Of a number of the whole model."""
    label = next(label for label, declared in run.declared.items() if quantity in declared)
    return f"{label}/{_short(label, quantity)}"


def _short(label: str, quantity: str) -> str:
    """Without the label, or the name that the monitor was given."""
    given, _, word = label.rpartition("_")
    prefix = f"{given}_" if given else ""
    return quantity.removeprefix(prefix).removeprefix(f"{word}_")


def _plain(tag: str) -> str:
    """The quantity that a tag is of, as reasons name it."""
    group, _, rest = tag.partition("/")
    if group == "lowrank":
        return tag
    stem = SUMMARY.fullmatch(rest)
    return group if group.endswith("_error") else f"{group}_{stem[1] if stem else rest}"


def _is_there(run: Run, quantity: str) -> bool:
    """Whether the event file has it: a model without heads has none of theirs."""
    names = {f"{label}/{_short(label, quantity)}" for label in run.declared}
    return any(tag in names or tag.partition("/")[0] == quantity for tag in run.logged)


def _of_curve(run: Run, quantity: str, tag: str, truths: dict[int, float]) -> Iterator[Compared]:
    group, _, rest = tag.partition("/")
    is_of_site = group == quantity
    errors = run.logged.get(f"{group}_error/{rest}" if is_of_site else f"{tag}_error", {})
    curve = run.logged.get(tag, {})
    for step, truth in truths.items():
        value, error = curve.get(step, math.inf), errors.get(step, math.nan)
        deviation = claim_of(quantity).deviation(value, truth, error)
        mean = truth.mean if isinstance(truth, Drawn) else truth
        yield Compared(quantity, tag, step, value, truth, deviation, not math.isnan(value) and not math.isnan(mean))


def _summaries(run: Run, found: Found) -> Iterator[Compared]:
    """Least, median and largest of the single sites that the event file has."""
    for quantity, sites in found.items():
        if "" in sites:
            continue
        label = next(label for label, declared in run.declared.items() if quantity in declared)
        for name in (quantity, f"{quantity}_error"):
            curves = [curve for tag, curve in run.logged.items() if tag.startswith(f"{name}/")]
            for end, reduce in ENDS.items() if curves else ():
                tag = f"{label}/{_short(label, name)}_{end}"
                for step in sorted({step for curve in curves for step in curve}):
                    known = [curve[step] for curve in curves if math.isfinite(curve.get(step, math.nan))]
                    truth = float(reduce(known)) if known else math.nan
                    value = run.logged.get(tag, {}).get(step, math.inf)
                    deviation = Claim("").deviation(value, truth, math.nan)
                    yield Compared(f"<summary>_{end}", tag, step, value, truth, deviation, not math.isnan(truth))
