"""How unlike each other the neurons of a model are, layer by layer, free of scale.

Shape letters:  B any batch axes   M rows, N columns of a matrix   C channels in   n matrices measured at once
"""

import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.scaling.bootstrap import FEWEST_NODES, TRUSTED, standard_error
from lightning_lowrank.maths.scaling.multifractal import DIRECTIONS, multifractal_spectrum
from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.maths.spectra.spectrum import full_precision
from lightning_lowrank.measuring.number_source import Numbers, NumberSource, Quantity, led_by, refuse_seed
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.measuring.sources.weights import Weights
from lightning_lowrank.models.sites import Site
from lightning_lowrank.models.training import Training
from lightning_lowrank.models.views import View
from lightning_lowrank.monitors.multifractal.curves import curves, vectors
from lightning_lowrank.monitors.multifractal.sharded import counted_apart, lies_apart, parts
from lightning_lowrank.statistics import find

# What rank mode has to say of a matrix: not the correlation dimension, which is 1 there.
OF_A_MATRIX = (
    *("dispersion", "dispersion_chance", "alpha0", "width", "width_floor", "width_over_floor", "c2_excess"),
    *("box_dimension", "asymmetry", "scaling_fit", "decades", "kept_share", "valid"),
)

# How views of convolutions end: columns are channels times taps.
KERNELS = re.compile(r"\(d_in( k\d)+\)$")

# Entries of matrices of one shape that are measured at once.
CHUNK = 2**24

# What every logger gets.
CORE = ("multifractal_dispersion", "multifractal_width_over_floor")


class Neurons(NumberSource):
    """Multifractal numbers of the weights as they are before the step of the sample.

    Args:
        weights: Which of them.
        max_neurons: Neurons that are looked at in each matrix or layer.
        seed: Of what is drawn.

    Raises:
        ValueError: `max_neurons` is below 2.
    """

    level = "structure"
    # Every process has the same weights, or its part of them: each measures its share.
    shared = True

    def __init__(self, weights: Weights, *, max_neurons: int | None, seed: int) -> None:
        if max_neurons is not None and (type(max_neurons) is not int or max_neurons < 2):
            raise ValueError(f"max_neurons={max_neurons!r} must be a whole number of at least 2, or None for all")
        refuse_seed(seed)
        self._weights, self._max_neurons, self._seed = weights, max_neurons, seed
        self._found: Sequence[Numbers] | None = None

    @abstractmethod
    def measured(self, batch: Batch) -> Sequence[Numbers]:
        """The results of this process."""

    def plan(self, training: Training) -> None:
        """Choose the sites."""
        self._weights.plan(training)
        if self._weights.match is not None and not self._weights.sites:
            raise ValueError(
                f"match={self._weights.match!r} without exclude={self._weights.exclude!r} leaves no matrix to measure"
            )

    def batch_begins(self, batch: Batch) -> None:
        """Measure, once in a sample: weights are the same until an optimizer steps."""
        if self._found is None:
            self._found = self.measured(batch)

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """The results."""
        found, self._found = self._found or [], None
        return found

    def detach(self) -> None:
        """Drop the unfinished sample."""
        self._found = None

    def _drawn(self, device: torch.device) -> torch.Generator:
        """The same draws at every sample."""
        return torch.Generator(device).manual_seed(self._seed)


class Multifractal(Neurons):
    """Multifractal statistics of every matrix in both directions, by the ranks of its entries.

    A matrix has two sites: `.in`, whose neurons are its rows with incoming weights, and `.out`, whose neurons are its
    columns with outgoing weights.

    Args:
        match: Parameters: globs on the full name, `re:REGEX`, `type:LAYERCLASS`; all matrices by default.
        exclude: Patterns of what to leave out, as for `match`.
        max_neurons: Number of neurons to use in each matrix, the same ones at every sample; all by default. From 256
            on, numbers whose sampling error can be estimated come with it.
        heads: Split attention weights by head.
        views: Your own einops patterns by parameter name.
        seed: Seed for the choice of neurons.

    Raises:
        ValueError: `max_neurons` is below 2; in `plan`: a pattern matches nothing.
    """

    name = "multifractal"

    def __init__(
        self,
        *,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        max_neurons: int | None = None,
        heads: bool = False,
        views: Mapping[str, str | View] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            Weights(match=match, exclude=exclude, heads=heads, views=views), max_neurons=max_neurons, seed=seed
        )
        self._estimated = TRUSTED.keys() if max_neurons is not None and max_neurons >= FEWEST_NODES else ()
        # A tag for each matrix would flood the list of histograms: the tab draws them.
        self.curves = curves("multifractal", histogram=False)
        given = [
            Quantity(f"multifractal_{name}", find(name).unit, per_site=True, estimated=name in self._estimated)
            for name in OF_A_MATRIX
        ]
        self.quantities = led_by(CORE, given, looked_up=("_width_floor",))

    def labels(self) -> list[str]:
        """Both directions of every matrix."""
        return [f"{label}.{direction}" for label in self._weights.labels() for direction in DIRECTIONS]

    def measured(self, batch: Batch) -> list[Numbers]:
        """The statistics of this process's share."""
        apart = [site for site in self._weights.sites if lies_apart(site)]
        together = [site for site in self._weights.sites if site not in apart]
        return [*self._of_parts(apart, batch.training.team), *self._of_matrices(together, batch.training.team)]

    def _of_parts(self, sites: Sequence[Site], team: Team) -> Iterator[Numbers]:
        """Of large sharded matrices: every process counts in its parts, and one of them has the statistics."""
        for site, owner in zip(sites, team.assign([float(sum(site.shape[-2:])) for site in sites]), strict=True):
            for part, direction in product(parts(site), DIRECTIONS):
                draws = self._drawn(part.entries.device)
                scaling = counted_apart(part, direction, team, max_neurons=self._max_neurons, generator=draws)
                if owner == team.rank:
                    yield from self._statistics([part.label], direction, part.shape, scaling, draws)

    def _of_matrices(self, sites: Sequence[Site], team: Team) -> Iterator[Numbers]:
        """Of those that come whole to one process: all of one shape at once."""
        alike: dict[torch.Size, list[tuple[str, Tensor]]] = defaultdict(list)
        for label, matrix in self._matrices(sites, team):
            alike[matrix.shape].append((label, matrix))
        for shape, members in alike.items():
            for some in _split(members, max(1, CHUNK // max(1, shape.numel()))):
                # A matrix larger than a chunk is by itself, and is not copied.
                matrices = torch.stack([matrix for _, matrix in some]) if len(some) > 1 else some[0][1][None]
                for direction in DIRECTIONS:
                    draws = self._drawn(matrices.device)
                    scaling = multifractal_spectrum(
                        matrices, direction=direction, max_neurons=self._max_neurons, generator=draws
                    )
                    yield from self._statistics([label for label, _ in some], direction, shape, scaling, draws)

    def _matrices(self, sites: Sequence[Site], team: Team) -> Iterator[tuple[str, Num[Tensor, "_ _"]]]:
        """What is this process's to measure, whole."""
        gathered = team.gather(
            [site.values() for site in sites], team.assign([float(prod(site.shape)) for site in sites])
        )
        for site, whole in zip(sites, gathered, strict=True):
            if whole is None:
                continue
            try:
                yield from zip(site.labels, connections(site, site.weight(*whole)).flatten(0, -3), strict=True)
            except (
                Exception
            ) as error:  # a user's parametrization may raise anything, and the other sites are none the worse for it
                self.trouble = error

    def _statistics(
        self, labels: Sequence[str], direction: str, shape: Sequence[int], scaling: Scaling, draws: torch.Generator
    ) -> Iterator[Numbers]:
        """Of a batch of matrices of one shape."""
        values = {f"multifractal_{name}": find(name)(scaling) for name in OF_A_MATRIX}
        found = (
            values,
            self._errors(scaling, shape[DIRECTIONS.index(direction)], draws),
            vectors("multifractal", scaling),
        )
        for i, label in enumerate(labels):
            yield Numbers(f"{label}.{direction}", *({name: row[i] for name, row in rows.items()} for rows in found))

    def _errors(self, scaling: Scaling, count: int, draws: torch.Generator) -> dict[str, Float[Tensor, " n"]]:
        """None where all of so many neurons are looked at."""
        asked = [name for name in OF_A_MATRIX if name in self._estimated]
        if self._max_neurons is not None and self._max_neurons >= count:
            return {f"multifractal_{name}": scaling.only_valid(torch.zeros_like(scaling.fit[..., 0])) for name in asked}
        return {f"multifractal_{name}": standard_error(name, scaling, generator=draws) for name in asked}


def connections(site: Site, weight: Num[Tensor, "*B M N"]) -> Num[Tensor, "*_ M C"]:
    """The matrices of a site, a batch even if it is one, with kernels of a convolution by their norms."""
    taps = _num_taps(site)
    if taps > 1:
        with full_precision(weight.device):
            weight = weight.unflatten(-1, (-1, taps)).to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=-1)
    return weight if weight.ndim > 2 else weight[None]


def _num_taps(site: Site) -> int:
    """Entries of one kernel, where columns are channels times taps; else 1."""
    if site.product is not None or not KERNELS.search(site.view.pattern):
        return 1
    shape = (site.computation or site.parameters[0]).shape
    return prod(shape[2:])


def _split(members: list[tuple[str, Tensor]], count: int) -> Iterator[list[tuple[str, Tensor]]]:
    return (members[i : i + count] for i in range(0, len(members), count))
