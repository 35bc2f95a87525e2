"""How unlike each other the neurons of a model are, layer by layer, free of scale.

Shape letters:  B any batch axes   M rows, N columns of a matrix   C channels in   n matrices measured at once   Q orders
"""

import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lightning_lowrank.effective_weights import computed_shape
from lightning_lowrank.scaling.bootstrap import FEWEST_NODES, TRUSTED, standard_error
from lightning_lowrank.scaling.multifractal import DIRECTIONS, multifractal_spectrum
from lightning_lowrank.scaling.scaling import ORDERS, Scaling
from lightning_lowrank.sites import Site
from lightning_lowrank.sources.gauge import Curve, Gauge, Numbers, Quantity
from lightning_lowrank.sources.source import Begun
from lightning_lowrank.sources.weights import Weights
from lightning_lowrank.spectrum import full_precision
from lightning_lowrank.statistics import find
from lightning_lowrank.team import Team
from lightning_lowrank.views import View

# What rank mode has to say of a matrix: not the correlation dimension, which is 1 there.
OF_A_MATRIX = (
    *("dispersion", "dispersion_chance", "alpha0", "width", "width_floor", "c2_excess", "box_dimension", "asymmetry"),
    *("scaling_fit", "decades", "kept_share", "valid"),
)

# Vectors over every second order q.
VECTORS = ("tau", "dimensions", "alpha", "f")

# How views of convolutions end: columns are channels times taps.
KERNELS = re.compile(r"\(d_in( k\d)+\)$")

# Entries of matrices of one shape that are measured at once.
CHUNK = 2**24


class Neurons(Gauge):
    """A gauge of the weights as they are before the step of the sample.

    Args:
        weights: Which of them.
        seed: Of what is drawn.
    """

    level = "structure"
    # Every process has the same weights, or its part of them: each measures its share.
    shared = True

    def __init__(self, weights: Weights, *, seed: int) -> None:
        self._weights, self._seed = weights, seed
        self._found: Sequence[Numbers] | None = None

    @abstractmethod
    def measured(self, begun: Begun) -> Sequence[Numbers]:
        """What this process finds."""

    def plan(self, module: nn.Module) -> None:
        """Choose the sites."""
        self._weights.plan(module)

    def batch_begins(self, begun: Begun) -> None:
        """Measure, once in a sample: weights are the same until an optimizer steps."""
        if self._found is None:
            self._found = self.measured(begun)

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """What was found."""
        found, self._found = self._found or [], None
        return found

    def detach(self) -> None:
        """Forget the sample in the making."""
        self._found = None

    def _drawn(self, device: torch.device) -> torch.Generator:
        """The same draws at every sample."""
        return torch.Generator(device).manual_seed(self._seed)


class Multifractal(Neurons):
    """Multifractal statistics of every matrix in both directions, by the ranks of its entries.

    A matrix has two sites: `.in`, whose neurons are its rows with the weights that come in, and `.out`, its columns with those that go out.

    Args:
        match: Parameters: globs on the full name, `re:REGEX`, `type:LAYERCLASS`; all matrices unless given.
        exclude: The same, taken away.
        max_neurons: Neurons that are looked at in each matrix, the same at every sample; all unless given. From 256 on numbers that
            sampling is known to tell come with an error.
        heads: Split attention weights by head.
        views: Your own einops patterns by parameter name.
        seed: Of the neurons that are drawn.

    Raises:
        ValueError: `max_neurons` is below 2; in `plan`, a pattern fits nothing.
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
        super().__init__(Weights(match=match, exclude=exclude, heads=heads, views=views), seed=seed)
        self._max_neurons = refuse_few(max_neurons)
        self._estimated = TRUSTED.keys() if max_neurons is not None and max_neurons >= FEWEST_NODES else ()
        self.curves = curves("multifractal")
        self.quantities = [
            Quantity(f"multifractal_{name}", find(name).unit, per_site=True, estimated=name in self._estimated) for name in OF_A_MATRIX
        ]

    def labels(self) -> list[str]:
        """Both directions of every matrix."""
        return [f"{label}.{direction}" for label in self._weights.labels() for direction in DIRECTIONS]

    def measured(self, begun: Begun) -> list[Numbers]:
        """The statistics of this process's share."""
        alike: dict[torch.Size, list[tuple[str, Tensor]]] = defaultdict(list)
        for label, matrix in self._matrices(begun.team):
            alike[matrix.shape].append((label, matrix))
        return [
            numbers
            for shape, members in alike.items()
            for some in _split(members, max(1, CHUNK // max(1, shape.numel())))
            for direction in DIRECTIONS
            for numbers in self._statistics(some, direction)
        ]

    def _matrices(self, team: Team) -> Iterator[tuple[str, Num[Tensor, "_ _"]]]:
        """What is this process's to measure, whole."""
        sites = self._weights.sites
        parts = team.gathered([site.values() for site in sites], team.assigned([float(prod(site.shape)) for site in sites]))
        for site, whole in zip(sites, parts, strict=True):
            if whole is None:
                continue
            try:
                yield from zip(site.labels, connections(site, site.weight(*whole)).flatten(0, -3), strict=True)
            except Exception as error:  # of the user's parametrization, which does no harm to other sites
                self.trouble = error

    def _statistics(self, members: Sequence[tuple[str, Tensor]], direction: str) -> Iterator[Numbers]:
        """Of matrices of one shape."""
        # A matrix larger than a chunk is by itself, and is not copied.
        matrices = torch.stack([matrix for _, matrix in members]) if len(members) > 1 else members[0][1][None]
        draws = self._drawn(matrices.device)
        scaling = multifractal_spectrum(matrices, direction=direction, max_neurons=self._max_neurons, generator=draws)
        values = {f"multifractal_{name}": find(name)(scaling) for name in OF_A_MATRIX}
        found = values, self._errors(scaling, draws), vectors("multifractal", scaling)
        for i, (label, _) in enumerate(members):
            yield Numbers(f"{label}.{direction}", *({name: row[i] for name, row in rows.items()} for rows in found))

    def _errors(self, scaling: Scaling, draws: torch.Generator) -> dict[str, Float[Tensor, " n"]]:
        asked = [name for name in OF_A_MATRIX if name in self._estimated]
        return {f"multifractal_{name}": standard_error(name, scaling, generator=draws) for name in asked}


def connections(site: Site, weight: Num[Tensor, "*B M N"]) -> Num[Tensor, "*_ M C"]:
    """The matrices of a site, a batch even if it is one, with kernels of a convolution by their norms."""
    taps = _num_taps(site)
    if taps > 1:
        with full_precision(weight.device):
            weight = weight.unflatten(-1, (-1, taps)).to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=-1)
    return weight if weight.ndim > 2 else weight[None]


def curves(source: str) -> list[Curve]:
    """What `vectors` gives."""
    return [Curve(f"{source}_{name}", ORDERS[::2]) for name in VECTORS]


def vectors(source: str, scaling: Scaling) -> dict[str, Float[Tensor, "*B Q"]]:
    """Exponents, dimensions and the spectrum over the orders; NaN where there is no spectrum."""
    return {f"{source}_{name}": torch.where(scaling.valid[..., None], getattr(scaling, name), torch.nan)[..., ::2] for name in VECTORS}


def refuse_few(max_neurons: int | None) -> int | None:
    """The number, if so many neurons can be compared.

    Raises:
        ValueError: They can not.
    """
    if max_neurons is not None and max_neurons < 2:
        raise ValueError(f"max_neurons={max_neurons}: at least 2, or None for all")
    return max_neurons


def _num_taps(site: Site) -> int:
    """Entries of one kernel, where columns are channels times taps; else 1."""
    if site.product is not None or not KERNELS.search(site.view.pattern):
        return 1
    shape = site.parameters[0].shape if site.parametrization is None else computed_shape(site.parametrization)
    return prod(shape[2:])


def _split(members: list[tuple[str, Tensor]], count: int) -> Iterator[list[tuple[str, Tensor]]]:
    return (members[i : i + count] for i in range(0, len(members), count))
