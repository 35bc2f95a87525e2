"""The path of all parameters as a plain callback saw it, by numpy's singular values."""

from itertools import pairwise

import numpy as np

from tests.independent.ranks import Found
from tests.independent.trainings import Run


def expected(run: Run) -> Found:
    """The quantities of `TrajectorySubspace`, which keeps all snapshots of so few steps."""
    path = np.stack(
        [np.concatenate([p.double().flatten().numpy() for p in step.before.values()]) for step in run.steps]
    )
    found: Found = {}
    for i in range(len(path)):
        walk = np.array([[min(first, second) for second in range(i + 1)] for first in range(i + 1)], float)
        values = {"": _of(path[: i + 1]), "_random_walk": _of(np.linalg.cholesky(walk + 1))}
        for end, known in values.items():
            for name, value in known.items():
                found.setdefault(f"trajectory_{name}{end}", {}).setdefault("", {})[i] = value
        found.setdefault("trajectory_snapshots", {}).setdefault("", {})[i] = i + 1.0
    return found


def _of(path: np.ndarray) -> dict[str, float]:
    energies = np.linalg.svd(path - path.mean(0), compute_uv=False) ** 2
    few = len(path) < 3
    found = {f"explained_{k}": energies[:k].sum() / energies.sum() if len(path) > k + 1 else np.nan for k in (1, 2, 4)}
    length = sum(np.linalg.norm(after - before) for before, after in pairwise(path))
    found["participation_ratio"] = np.nan if few else energies.sum() ** 2 / (energies**2).sum()
    found["straightness"] = np.nan if few else np.linalg.norm(path[-1] - path[0]) / length
    return found
