"""Principal components of several models, from their inner products: no matrix of models by parameters is formed.

Shape letters:  N models   K components   P parameters
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.marchenko_pastur import quantiles

# Eigenvalues below this part of the largest are rounding.
NOISE = 1e-12


@dataclass(frozen=True)
class Components:
    """Orthonormal directions about the mean of N models.

    Attributes:
        values: Energy of the centred models along each, largest first.
        weights: Each direction as a sum of models: component k is `sum_i weights[k, i] x_i`.
        coefficients: Of each model about the mean.
    """

    values: Float[Tensor, " K"]
    weights: Float[Tensor, "K N"]
    coefficients: Float[Tensor, "N K"]


def centred(gram: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    """Inner products of the models less their mean.

    Examples:
        >>> centred(torch.tensor([[4.0, 2.0], [2.0, 4.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def components(gram: Float[Tensor, "N N"], k: int | None = None) -> Components:
    """The `k` strongest principal components, or as many as there are: at most N - 1.

    Cost: an eigendecomposition of N x N.

    Args:
        gram: Inner products of the models, not centred.
        k: All unless given.
    """
    values, vectors = torch.linalg.eigh(centred(gram))
    values, vectors = values.flip(0)[: len(gram) - 1], vectors.flip(1)[:, : len(gram) - 1]
    live = int((values > NOISE * values[:1].clamp(min=torch.finfo(gram.dtype).tiny)).sum())
    kept = live if k is None else min(k, live)
    roots = values[:kept].sqrt()
    return Components(values[:kept], (vectors[:, :kept] / roots).T, vectors[:, :kept] * roots)


def explained(gram: Float[Tensor, "N N"], ks: Sequence[int]) -> list[float]:
    """Part of the centred energy of all models in their `k` strongest components; NaN where all models are equal.

    In sample: N - 1 components explain everything, and of independent noise `k` of them explain `k / (N - 1)`.
    """
    values = components(gram).values
    total = float(centred(gram).trace())
    return [float(values[:k].sum()) / total if len(values) else float("nan") for k in ks]


def gaussian_share(rows: int, columns: int, ks: Sequence[int]) -> list[float]:
    """Part of the energy of a Gaussian matrix in its `k` strongest directions, by the Marchenko-Pastur law.

    Of N models of P parameters, centred: `gaussian_share(N - 1, P, ks)`, which is `k / (N - 1)` for P far above N.

    Examples:
        >>> [round(share, 3) for share in gaussian_share(31, 10**9, [1, 16])]
        [0.032, 0.516]
    """
    energies = quantiles(*sorted((rows, columns))).square()
    return [float(energies[:k].sum() / energies.sum()) for k in ks]


def cosines(gram: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    """Cosines of all pairs of models minus their mean. For independent noise they are `-1 / (N - 1)`; for a model equal
    to the mean they are 0.
    """
    inner = centred(gram)
    norms = inner.diagonal().clamp(min=0).sqrt()
    products = norms[:, None] * norms
    return torch.where(products > 0, inner / products.clamp(min=torch.finfo(gram.dtype).tiny), 0.0)
