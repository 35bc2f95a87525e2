"""The whole model as one network of neurons, by NeuroMFA's published recipe, beside what chance and norm growth give.

Shape letters:  B any batch axes   M rows, N columns of a matrix   K samples of neurons
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lightning_lowrank.maths.scaling.multifractal import multifractal_spectrum
from lightning_lowrank.maths.scaling.neuromfa import THRESHOLD, emergence, typical_threshold
from lightning_lowrank.maths.scaling.nulls import gaussian_like, shuffled
from lightning_lowrank.maths.scaling.scaling import ORDERS, Scaling
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Numbers, Quantity, led_by
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.measuring.sources.weights import Weights
from lightning_lowrank.models.sites import Site
from lightning_lowrank.models.training import Training
from lightning_lowrank.models.views import View
from lightning_lowrank.monitors.multifractal.curves import SPECTRUM, curves, vectors
from lightning_lowrank.monitors.multifractal.source import Neurons, connections
from lightning_lowrank.statistics import find

# Said of the network and of both nulls; and of the network only.
COMPARED = ("alpha0", "width", "dispersion", "valid")
OF_THE_NETWORK = ("asymmetry", "scaling_fit", "decades", "kept_share")

# The orders of nulls: a concave tau has its width at the ends, and the sums over a network take most of the time.
FEW_ORDERS = ORDERS[::5]

# Of thresholds: a table has a column for each integer radius, and weights may be zero.
LONGEST = 10_000.0

# What every logger gets.
CORE = ("neuromfa_alpha0", "neuromfa_width", "neuromfa_emergence", "neuromfa_emergence_shuffled")


class NeuroMFA(Neurons):
    """Multifractal statistics of all layers as one network, as published, with two nulls: shuffled entries, and
    Gaussian entries of equal variance.

    `neuromfa_emergence` compares width and position with those of the first sample of the run; for a null, with the
    null's own first sample.

    Args:
        match: Parameters: globs on the full name, `re:REGEX`, `type:LAYERCLASS`; by default all matrices except
            embeddings.
        exclude: Patterns of what to leave out, as for `match`.
        max_neurons: Number of neurons to draw per layer, the same ones at every sample, `num_repeats` times (published:
            32); all neurons once by default.
        num_repeats: Number of such draws.
        threshold: Longest edge `1 / |w|` that is kept. None uses three divided by the root mean square of the weights
            at the first sample of the run.
        views: Your own einops patterns by parameter name.
        seed: Seed for the choice of neurons.

    Raises:
        ValueError: A number is out of range; in `plan`: a pattern matches nothing.
    """

    name = "neuromfa"

    def __init__(
        self,
        *,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        max_neurons: int | None = None,
        num_repeats: int = 10,
        threshold: float | None = THRESHOLD,
        views: Mapping[str, str | View] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(Weights(match=match, exclude=exclude, views=views), max_neurons=max_neurons, seed=seed)
        if type(num_repeats) is not int or num_repeats < 1:
            raise ValueError(f"num_repeats={num_repeats!r} must be a whole number of at least 1")
        if threshold is not None and not (isinstance(threshold, float | int) and 2 <= threshold <= LONGEST):
            why = (
                f"expected the largest length 1 / |w| of a kept edge, from 2 to {LONGEST:g}; the published value is "
                f"{THRESHOLD:g}"
            )
            raise ValueError(f"threshold={threshold!r}: {why}")
        self._num_repeats, self._threshold = num_repeats, threshold
        self._frozen: float | None = None
        self._first: dict[str, Tensor] = {}
        self._sites: list[Site] = []
        self.curves = curves("neuromfa", histogram=True)
        self.quantities = led_by(CORE, self._quantities(), looked_up=("_shuffled", "_gaussian"))

    def plan(self, training: Training) -> None:
        """Choose the layers; embeddings do not count unless patterns name them."""
        super().plan(training)
        embeddings = [layer for layer in training.module.modules() if isinstance(layer, nn.Embedding | nn.EmbeddingBag)]
        left_out = {id(p) for layer in embeddings for p in layer.parameters()} if self._weights.match is None else set()
        self._sites = [site for site in self._weights.sites if left_out.isdisjoint(map(id, site.parameters))]

    def labels(self) -> list[str]:
        """The whole model."""
        return [WHOLE_MODEL] if self._sites else []

    def measured(self, batch: Batch) -> list[Numbers]:
        """The statistics, on the first process, which has the references of the checkpoint."""
        (parts,) = batch.training.team.gather([[value for site in self._sites for value in site.values()]], [0])
        if not parts:
            return []
        rest = iter(parts)
        weights = [site.weight(*(next(rest) for _ in site.parameters)) for site in self._sites]
        draws = torch.Generator(weights[0].device).manual_seed(batch.seed)
        network = list(self._chain(weights))
        nulls = {
            "": network,
            "_shuffled": (shuffled(matrix, generator=draws) for matrix in network),
            "_gaussian": self._chain([_gaussian(weight, draws) for weight in weights]),
        }
        values: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}
        drawn: dict[str, Tensor] = {}
        for end, matrices in nulls.items():
            scaling = self._scaling(list(matrices), FEW_ORDERS if end else ORDERS)
            self._describe(scaling, end, values, errors)
            drawn = drawn or _for_the_tab(scaling)
        return [Numbers(WHOLE_MODEL, values, errors, drawn)]

    def state_dict(self) -> dict[str, Any]:
        """The reference values of emergence, so that a resumed run continues with them."""
        return {"first": dict(self._first), "threshold": self._frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load them."""
        self._first, self._frozen = dict(state.get("first", {})), state.get("threshold")

    def _chain(self, weights: Sequence[Tensor]) -> Iterator[Num[Tensor, "_ _"]]:
        """All matrices in the order of the layers, rows are outputs; queries, keys and values as one, as published."""
        for site, weight in zip(self._sites, weights, strict=True):
            matrices = connections(site, weight)
            yield from (
                [matrices.flatten(0, -2)] if re.search(r"\bq[kv]{2}\b", site.view.pattern) else matrices.flatten(0, -3)
            )

    def _scaling(self, matrices: Sequence[Tensor], orders: Sequence[float]) -> Scaling:
        longest = self._longest(matrices)
        known: dict[str, Any] = {
            "max_neurons": self._max_neurons,
            "num_repeats": self._num_repeats,
            "threshold": longest,
        }
        return multifractal_spectrum(
            matrices, "neuromfa", generator=self._drawn(matrices[0].device), orders=orders, **known
        )

    def _longest(self, matrices: Sequence[Tensor]) -> float:
        """The threshold, that of the first weights which are finite and not all 0."""
        if self._frozen is None:
            # The one wait for the device, in the first sample of a run: the number of radii depends on it.
            chosen = self._threshold or float(typical_threshold(matrices))
            if not 0 < chosen < inf:
                return THRESHOLD
            self._frozen = min(max(2.0, chosen), LONGEST)
        return self._frozen

    def _describe(self, scaling: Scaling, end: str, values: dict[str, Tensor], errors: dict[str, Tensor]) -> None:
        """Means over the samples of neurons that have a spectrum, with their errors."""
        for name in COMPARED if end else (*COMPARED, *OF_THE_NETWORK):
            found = find(name)(scaling).reshape(-1)
            tag = f"neuromfa_{name}{end}"
            values[tag], errors[tag] = found.nanmean(), _error(found)
        values[f"neuromfa_emergence{end}"] = self._emergence(
            values[f"neuromfa_alpha0{end}"], values[f"neuromfa_width{end}"], end
        )

    def _emergence(self, alpha0: Float[Tensor, ""], width: Float[Tensor, ""], end: str) -> Float[Tensor, ""]:
        """Held against the first sample that had a spectrum."""
        now = torch.stack([alpha0, width])
        first = self._first.get(end, now).to(now)
        first = self._first[end] = torch.where(first.isnan().any(), now, first)
        return emergence(alpha0, width, first[0], first[1])

    def _quantities(self) -> Iterator[Quantity]:
        sampled = self._max_neurons is not None and self._num_repeats > 1
        for name in (*COMPARED, "emergence"):
            estimated = sampled and name in ("alpha0", "width", "dispersion")
            yield from (
                Quantity(f"neuromfa_{name}{end}", estimated=estimated) for end in ("", "_shuffled", "_gaussian")
            )
        yield from (Quantity(f"neuromfa_{name}", find(name).unit) for name in OF_THE_NETWORK)


def _gaussian(weight: Num[Tensor, "*B M N"], draws: torch.Generator) -> Float[Tensor, "*B M N"]:
    """Independent entries of the same mean and variance, before kernels become norms."""
    wide = weight.abs() if weight.is_complex() else weight.to(torch.promote_types(weight.dtype, torch.float32))
    return gaussian_like(wide.flatten(0, -2), generator=draws).view(weight.shape)


def _for_the_tab(scaling: Scaling) -> dict[str, Float[Tensor, " _"]]:
    """Spectra are means over the samples of neurons that have one; the rest, by which a single fit is judged, is of the
    first sample.
    """
    rows = {name: row.reshape(-1, row.shape[-1]) for name, row in vectors("neuromfa", scaling).items()}
    means = {f"neuromfa_{name}" for name in SPECTRUM}
    return {name: row.nanmean(0) if name in means else row[0] for name, row in rows.items()}


def _error(found: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """Standard error of the mean over samples of neurons; NaN of a single one."""
    known = ~found.isnan()
    count = known.sum()
    deviations = torch.where(known, found - found.nanmean(), 0.0)
    return (deviations.square().sum() / (count - 1) / count).sqrt()
