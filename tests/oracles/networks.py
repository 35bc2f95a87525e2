"""Networks whose exponents are known, and the published recipe in loops, by numpy and scipy alone: nothing here imports
the package.
"""

from collections import Counter

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import shortest_path
from scipy.stats import linregress


def cascade_distances(parts, base, levels):
    """Nodes split again and again in the ratio of `parts`; two of them are `base ** -k` apart if they part after k
    splits.
    """
    ends = np.cumsum(parts)
    total = ends[-1]
    digits = np.stack(np.unravel_index(np.arange(total**levels), (total,) * levels), -1)
    classes = np.searchsorted(ends, digits, side="right")
    shared = np.zeros((len(digits), len(digits)), dtype=int)
    together = np.ones_like(shared, dtype=bool)
    for level in range(levels):
        together &= classes[:, None, level] == classes[None, :, level]
        shared += together
    distances = float(base) ** -shared
    np.fill_diagonal(distances, 0.0)
    return distances


def cascade_tau(parts, base, q):
    """Its exponents, of sums over nodes."""
    shares = np.array(parts) / np.sum(parts)
    return -np.log((shares[None, :] ** (np.asarray(q, dtype=float)[:, None] + 1)).sum(-1)) / np.log(base)


def cascade_alpha(parts, base, q):
    """The derivative of that."""
    shares = np.array(parts) / np.sum(parts)
    powers = shares[None, :] ** (np.asarray(q, dtype=float)[:, None] + 1)
    return -(powers * np.log(shares)).sum(-1) / powers.sum(-1) / np.log(base)


def cascade_weights(parts, base, levels, seed=0):
    """The same as a weight matrix of lengths `1 / |w|`: rows and columns in any order, signs at random, no edge to
    itself.
    """
    draw = np.random.default_rng(seed)
    distances = cascade_distances(parts, base, levels)
    weights = np.divide(1.0, distances, where=distances > 0, out=np.zeros_like(distances))
    weights *= draw.choice([-1.0, 1.0], weights.shape)
    return weights[draw.permutation(len(weights))][:, draw.permutation(len(weights))]


def binomial_masses(share, levels):
    """What 2 ** levels boxes hold of a measure that is split again and again, a share to the left and the rest to the
    right.
    """
    masses = np.ones(1)
    for _ in range(levels):
        masses = np.concatenate([share * masses, (1 - share) * masses])
    return masses


def star_masses(dimensions, ends=16384, num_radii=30):
    """Stars whose ends lie so that r ** D of them are within r, and radii that leave out the first few ends."""
    radii = np.exp(np.linspace(np.log((100 / ends) ** (1 / np.max(dimensions))), 0, num_radii))
    lengths = [((np.arange(ends) + 0.5) / ends) ** (1 / d) for d in dimensions]
    return np.array([[1.0 + (row <= r).sum() for r in radii] for row in lengths]), radii


def dijkstra(lengths):
    """Shortest ways in a network given by all its edges, infinity for none."""
    return shortest_path(np.where(np.isinf(lengths), 0, lengths), method="D")


def chain_distances(weights, sources, *, directed):
    """Shortest ways through layers whose edges have length 1 / |w|."""
    starts = np.cumsum([0, weights[0].shape[0], *(weight.shape[1] for weight in weights)])
    places = [np.nonzero(weight) for weight in weights]
    one = np.concatenate([starts[i] + rows for i, (rows, _) in enumerate(places)])
    other = np.concatenate([starts[i + 1] + columns for i, (_, columns) in enumerate(places)])
    lengths = np.concatenate([1 / np.abs(weight[place]) for weight, place in zip(weights, places, strict=True)])
    network = coo_matrix((lengths, (one, other)), shape=(starts[-1], starts[-1]))
    return shortest_path(network, method="D", directed=directed, indices=sources)


def hops(nodes, edges):
    """Numbers of steps between all nodes of an undirected network."""
    one, other = np.array(edges).T
    return shortest_path(
        coo_matrix((np.ones(len(one)), (one, other)), shape=(nodes, nodes)), directed=False, unweighted=True
    )


def ring(nodes, neighbours):
    """Each node tied to so many nearest others, half on each side."""
    return [(i, (i + j) % nodes) for i in range(nodes) for j in range(1, neighbours // 2 + 1)]


def watts_strogatz(nodes, neighbours, rewired, seed=0):
    """A ring of which each edge keeps one end and gets another at random, with that probability."""
    draw = np.random.default_rng(seed)
    edges = {tuple(sorted(edge)) for edge in ring(nodes, neighbours)}
    for i, j in ring(nodes, neighbours):
        if draw.random() < rewired:
            free = [
                k
                for k in draw.permutation(nodes)[: 4 * neighbours + 4]
                if k != i and tuple(sorted((i, k))) not in edges
            ]
            edges.remove(tuple(sorted((i, j))))
            edges.add(tuple(sorted((i, int(free[0])))))
    return sorted(edges)


def torus(side):
    """A square grid without borders."""
    nodes = np.arange(side * side).reshape(side, side)
    return [(int(i), int(j)) for axis in (0, 1) for i, j in zip(nodes.flat, np.roll(nodes, -1, axis).flat, strict=True)]


def flower(generations):
    """The (2, 2)-flower: a square, of which every edge becomes two ways of two edges, again and again."""
    edges, nodes = [(0, 1), (1, 2), (2, 3), (3, 0)], 4
    for _ in range(generations - 1):
        grown = []
        for one, other in edges:
            for middle in (nodes, nodes + 1):
                grown += [(one, middle), (middle, other)]
            nodes += 2
        edges = grown
    return edges, nodes


def tree_distances(children, factor, generations):
    """Distances in a tree where each node has so many children, each generation `factor` times as far away as the one
    above.
    """
    tops = np.cumsum([0, *(children**k for k in range(generations + 1))])
    edges = [
        (tops[k] + i // children, tops[k + 1] + i, factor**k)
        for k in range(generations)
        for i in range(children ** (k + 1))
    ]
    one, other, lengths = np.array(edges).T
    tree = coo_matrix((lengths, (one.astype(int), other.astype(int))), shape=(tops[-1], tops[-1]))
    return shortest_path(tree, directed=False)


def published_tau(lengths, orders, threshold):
    """The recipe of NeuroMFA's authors in loops: lengths of each neuron's edges -> tau, and alpha0 and width by forward
    differences.
    """
    neurons = [Counter(np.round([d for d in row if 1 < d <= threshold]).tolist()) for row in lengths]
    neurons = [kept for kept in neurons if sum(kept.values()) > 10]
    radii = sorted(set().union(*neurons))
    masses = np.array([[1 + sum(n for d, n in kept.items() if d <= r) for r in radii] for kept in neurons], dtype=float)
    shares = masses / masses[:, -1:]
    tau = np.array([linregress(np.log(np.array(radii) / radii[-1]), np.log((shares**q).sum(0))).slope for q in orders])
    alpha = np.diff(tau) / np.diff(orders)
    f = np.array(orders)[:-1] * alpha - tau[:-1]
    # Two steps share the maximum but for rounding.
    return tau, alpha[np.round(f, 12).argmax()], alpha.max() - alpha.min()
