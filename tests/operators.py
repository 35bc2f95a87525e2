"""Operators whose spectra are known."""

import numpy as np
import torch

from lightning_lowrank.maths.operators.operators import Operator
from tests.oracles.spectra import gaussian

SIZE = 500
SPECTRA = {
    "zero": [],
    "rank 1": [3.0],
    "rank 3": [4.0, 2.0, 1.0],
    "repeated": [2.0, 2.0, 2.0],
    "identity": [1.0] * SIZE,
    "clustered": [100.0, 50.0, *np.linspace(0, 1, SIZE - 2)],
    "indefinite": [5.0, 3.0, -4.0, *np.linspace(-0.1, 0.1, SIZE - 3)],
}


def with_spectrum(values, *, size=SIZE, dtype=torch.float32, seed=0):
    """An operator with those eigenvalues, zeros besides, and its eigenvectors as rows."""
    vectors = torch.linalg.qr(gaussian(size, size, seed=seed))[0].T
    padded = torch.zeros(size, dtype=torch.float64)
    padded[: len(values)] = torch.as_tensor(values, dtype=torch.float64)
    matrix = (vectors.T @ (padded[:, None] * vectors)).to(dtype)
    return Operator(size, lambda v: matrix @ v, matrix.device, dtype), vectors.to(dtype)


def cross_entropy_factors(outputs):
    p = outputs.detach().softmax(-1)
    root = p.sqrt()
    scale = len(p) ** 0.5
    return (
        lambda u: (root * u - p * (root * u).sum(-1, keepdim=True)) / scale,
        lambda u: (root * u - root * (p * u).sum(-1, keepdim=True)) / scale,
    )
