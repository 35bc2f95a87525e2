"""Matrices with spectra that are known by construction, and their statistics by numpy alone: nothing here imports the
package.
"""

import numpy as np
import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def with_values(values, shape, *, seed=0):
    """A matrix of that shape with those singular values and random singular vectors, in float64."""
    short = min(shape)
    left, _ = torch.linalg.qr(gaussian(shape[0], short, seed=seed))
    right, _ = torch.linalg.qr(gaussian(shape[1], short, seed=seed + 1))
    padded = torch.zeros(short, dtype=torch.float64)
    padded[: len(values)] = torch.as_tensor(values, dtype=torch.float64)
    return (left * padded) @ right.mT


def geometric(count, condition):
    """`count` values that fall from 1 to 1 / condition by a constant factor."""
    return condition ** -np.linspace(0, 1, count)


def singular_values(matrix):
    """By numpy's LAPACK driver gesdd on the matrix itself in float64."""
    return np.linalg.svd(np.asarray(matrix.to(torch.float64)), compute_uv=False)


def entropy_rank(masses):
    shares = masses[masses > 0] / masses.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def energy_rank(values, epsilon=0.1):
    """By trial: the first count whose remainder is small enough."""
    energies = np.sort(values**2)[::-1]
    for count in range(len(energies) + 1):
        if energies[count:].sum() <= epsilon * energies.sum() * (1 + 1e-12):
            return count
    raise AssertionError


RANKS = {
    "energy_rank": energy_rank,
    "energy_rank_0.01": lambda s: energy_rank(s, 0.01),
    "stable_rank": lambda s: (s**2).sum() / s.max() ** 2,
    "effective_rank": entropy_rank,
    "effective_rank_energy": lambda s: entropy_rank(s**2),
    "participation_ratio": lambda s: (s**2).sum() ** 2 / (s**4).sum(),
    "nuclear_to_spectral": lambda s: s.sum() / s.max(),
    "schatten_quasi_norm_1": lambda s: s.sum(),
    "schatten_quasi_norm_1.5": lambda s: (s**1.5).sum() ** (1 / 1.5),
    "spectral_norm": lambda s: s.max(),
    "frobenius_norm": lambda s: np.sqrt((s**2).sum()),
}
