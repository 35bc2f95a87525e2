"""Shortest paths between neurons through a chain of layers, by min-plus products of whole layers.

Shape letters:  S sources   V neurons of all layers   R radii
"""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lightning_lowrank.maths.scaling.boxes import box_counting, magnitudes
from lightning_lowrank.maths.scaling.scaling import ORDERS, Scaling
from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype


def path_distances(
    weights: Sequence[Num[Tensor, "_ _"]], sources: Int[Tensor, " S"], *, directed: bool = False
) -> Float[Tensor, "S V"]:
    """Exact lengths of the shortest paths from some neurons of a chain of layers to all neurons, where an edge has
    length `1 / |w|`.

    The algorithm sweeps forward and backward over the layers until nothing changes. Networks of dense layers need four
    to seven sweeps, and directed paths one.

    Args:
        weights: Matrices of successive layers; rows are neurons of one layer, columns those of the next. A weight of 0
            means no edge.
        sources: Indices of neurons, counted through all layers from the first.
        directed: From layer to layer only; otherwise edges can be followed in both directions.

    Returns:
        Distances; infinity if there is no path.

    Raises:
        ValueError: The number of rows of a matrix differs from the number of columns of the previous one.

    Examples:
        >>> path_distances([torch.tensor([[1.0, 0.5]]), torch.tensor([[0.1], [1.0]])], torch.tensor([0]))
        tensor([[0., 1., 2., 3.]], dtype=torch.float64)
    """
    for i, (one, other) in enumerate(pairwise(weights)):
        if one.shape[1] != other.shape[0]:
            raise ValueError(
                f"matrix {i} ends with {one.shape[1]} neurons and matrix {i + 1} begins with {other.shape[0]}, so "
                "they are not a chain of layers"
            )
    for i, weight in enumerate(weights):
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"matrix {i} has entries that are not finite, so no paths lead through it")
    with full_precision(weights[0].device):
        lengths = [1 / magnitudes(weight, working_dtype(weight.device)) for weight in weights]
        sizes = [weights[0].shape[0], *(weight.shape[1] for weight in weights)]
        found = lengths[0].new_full((len(sources), sum(sizes)), math.inf).scatter_(1, sources[:, None], 0.0)
        layers = found.split(sizes, -1)
        _sweep(layers, lengths)
        if directed:
            return found
        back = [length.mT.contiguous() for length in reversed(lengths)]
        while True:
            before = found.clone()
            _sweep(layers[::-1], back)
            _sweep(layers, lengths)
            if torch.equal(found, before):
                return found


def _sweep(layers: Sequence[Float[Tensor, "S _"]], lengths: Sequence[Float[Tensor, "_ _"]]) -> None:
    """Shorten the distances to each layer by way of the one before it, in place."""
    for (near, far), length in zip(pairwise(layers), lengths, strict=True):
        best = far.contiguous()
        through = torch.empty_like(best)
        for j, row in enumerate(length):
            torch.add(near[:, j, None], row, out=through)
            torch.minimum(best, through, out=best)
        far.copy_(best)


def path_scaling(
    weights: Sequence[Num[Tensor, "_ _"]],
    *,
    generator: torch.Generator,
    num_sources: int = 128,
    num_radii: int = 24,
    directed: bool = False,
    orders: Sequence[float] = ORDERS,
) -> Scaling:
    """How the number of neurons within shortest paths of length r scales with r, around sampled neurons of a chain of
    layers.

    Dense layers form a small world, whose distances span less than one decade. Over such a range every curve seems to
    have a slope, so a warning is given.

    Args:
        weights: As for `path_distances`.
        generator: Draws the sources.
        num_sources: Number of neurons, from all layers, around which boxes are grown.
        num_radii: Number of radii. The smallest contains five neurons on average, the largest half of all reachable
            neurons.
        directed: From layer to layer only.
        orders: Values of q at which vectors are evaluated.
    """
    neurons = weights[0].shape[0] + sum(weight.shape[1] for weight in weights)
    sources = torch.randperm(neurons, generator=generator, device=generator.device)[:num_sources].to(weights[0].device)
    distances = path_distances(weights, sources, directed=directed)
    ordered = distances[torch.isfinite(distances) & (distances > 0)].sort().values
    if len(ordered) < 10 * len(sources):
        raise ValueError(
            f"from {len(sources)} sources only {len(ordered)} neurons can be reached, too few for a scaling of masses"
        )
    first, last = ordered[4 * len(sources)], ordered[len(ordered) // 2]
    decades = float((last / first).log10())
    if decades < 1:
        warnings.warn(
            (
                f"distances between neurons span {decades:.2f} decades; a slope over less than one decade is not a "
                "dimension"
            ),
            stacklevel=2,
        )
    radii = torch.exp(torch.linspace(0, 1, num_radii).to(ordered) * (last / first).log()) * first
    return box_counting(distances, radii, orders=orders)
