"""Box counting: masses within radii, from distances in any weighted network.

Shape letters:  B any batch axes   S nodes that boxes are grown around   N what their boxes may hold   R radii
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Num, Shaped
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import ORDERS, Scaling
from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype

# Entries that are compared with one radius at once, so that they stay in the cache.
CHUNK = 2**18


def box_counting(
    distances: Num[Tensor, "*B S N"],
    radii: Float[Tensor, " R"] | Sequence[float | int],
    *,
    orders: Sequence[float] = ORDERS,
) -> Scaling:
    """How the number of nodes within distance r of a node scales with r, in any network with known distances.

    Args:
        distances: From each of S nodes to all N nodes; 0 to itself, infinity if there is no path.
        radii: Ascending, in the unit of the distances; at least five.
        orders: Values of q at which vectors are evaluated.

    Examples:
        >>> steps = (torch.arange(64)[:, None] - torch.arange(64)).abs()
        >>> box_counting(torch.minimum(steps, 64 - steps), [1, 2, 3, 5, 8, 13, 21]).alpha_at(0.0)
        tensor(0.8819, dtype=torch.float64)
    """
    dtype = working_dtype(distances.device)
    with full_precision(distances.device):
        limits = torch.as_tensor(radii, dtype=dtype, device=distances.device).expand(*distances.shape[:-2], -1)
        masses = counts(distances.to(dtype), limits, torch.le)
    return Scaling(masses, torch.ones_like(limits), log_radii=limits.log(), orders=tuple(orders))


def counts(
    values: Float[Tensor, "*B S N"], limits: Float[Tensor, "*B R"], compare: Callable[..., Tensor]
) -> Float[Tensor, "*B S R"]:
    """How many entries of each row are at least as large as each limit, for `torch.ge`, or at most as large, for
    `torch.le`.
    """
    nodes, others = values.shape[-2:]
    found = torch.empty(*values.shape[:-1], limits.shape[-1], dtype=working_dtype(values.device), device=values.device)
    step = max(1, CHUNK // max(1, others))
    tables = found.view(-1, nodes, limits.shape[-1])
    flat = zip(values.reshape(-1, nodes, others), limits.reshape(-1, limits.shape[-1]), tables, strict=True)
    for matrix, row, out in flat:
        for part, counted in zip(matrix.split(step), out.split(step), strict=True):
            # Ones and zeros as numbers: PyTorch adds those up several times faster than truth values.
            held = torch.empty_like(part, dtype=torch.float32)
            for i, limit in enumerate(row):
                counted[:, i] = compare(part, limit, out=held).sum(-1)
    return found


def magnitudes(weights: Shaped[Tensor, "*B"], dtype: torch.dtype) -> Float[Tensor, "*B"]:
    """Absolute values, of numbers of any kind."""
    # Widened first: the smallest integer has no absolute value of its own kind, a truth value none at all.
    return weights.abs().to(dtype) if weights.is_complex() else weights.to(dtype).abs()


def graph_distances(lengths: Float[Tensor, "*B N N"]) -> Float[Tensor, "*B N N"]:
    """Lengths of the shortest paths between all pairs of nodes of a network, by the Floyd-Warshall algorithm in
    `N ** 3` steps.

    Args:
        lengths: Lengths of the edges, not negative; infinity if there is no edge. If not symmetric, the network is
            directed.

    Examples:
        >>> graph_distances(torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 1.0], [5.0, 1.0, 0.0]]))[0]
        tensor([0., 1., 2.], dtype=torch.float64)
    """
    with full_precision(lengths.device):
        # To itself a node has no way to go.
        found = lengths.to(working_dtype(lengths.device)).clone()
        found.diagonal(dim1=-2, dim2=-1).zero_()
        for k in range(lengths.shape[-1]):
            torch.minimum(found, found[..., :, k, None] + found[..., None, k, :], out=found)
        return found
