"""Scalings for tests."""

import torch

from lightning_lowrank.maths.scaling.boxes import box_counting
from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from tests.oracles import networks
from tests.oracles.spectra import gaussian

CASCADES = [((1, 2), 3, 6), ((1, 1), 3, 9), ((1, 2), 2, 6), ((1, 3), 2, 5)]


def cascade(parts, base, levels):
    """Of a network whose exponents are known in closed form."""
    distances = torch.as_tensor(networks.cascade_distances(parts, base, levels))
    return box_counting(distances, [float(base) ** -k for k in range(levels, -1, -1)])


def hops(nodes, edges, radii=None):
    """Of an unweighted network, at all radii or at some."""
    distances = torch.as_tensor(networks.hops(nodes, edges))
    return box_counting(distances, radii or [float(r) for r in range(1, int(distances.max()) + 1)])


def jittered(*shape, spread, seed=0):
    """Gaussian weights whose rows have scales of their own."""
    return gaussian(*shape, seed=seed) * (spread * gaussian(*shape[:-1], 1, seed=seed + 1000)).exp()


def uneven():
    """Of a batch of three matrices, each with a spectrum that is no more than chance in the first only."""
    return rank_scaling(torch.stack([jittered(64, 96, spread=s, seed=i) for i, s in enumerate((0, 0.05, 0.1))]))
