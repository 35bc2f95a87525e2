"""A subspace made to hold one more model, without the models that it is of.

Shape letters:  K components   P parameters
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Subspace:
    """Mean and components of models.

    Attributes:
        num_models: How many.
        mean: Of the models.
        basis: Orthonormal rows, strongest first.
        values: Energy of the centred models along each.
    """

    num_models: int
    mean: Float[Tensor, " P"]
    basis: Float[Tensor, "K P"]
    values: Float[Tensor, " K"]

    def project(self, model: Float[Tensor, " P"]) -> Float[Tensor, " K"]:
        """Coefficients of a model about the mean."""
        return self.basis @ (model - self.mean)

    def rebuilt(self, coefficients: Float[Tensor, " K"]) -> Float[Tensor, " P"]:
        """The model that has these coefficients."""
        return self.mean + coefficients @ self.basis


def extended(subspace: Subspace, model: Float[Tensor, " P"], k: int) -> Subspace:
    """The subspace of one model more, with the `k` strongest components.

    Exact if the subspace had all components, N - 1 of N models; what had been cut off before stays lost.

    References:
        Ross, Lim, Lin & Yang (2008), International Journal of Computer Vision 77, Section 3.1.
    """
    n = subspace.num_models
    away = (n / (n + 1)) ** 0.5 * (model - subspace.mean)
    rows = torch.cat([subspace.values.sqrt()[:, None] * subspace.basis, away[None]])
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = min(k, int((values > 1e-12 * values[0]).sum()))
    basis = (vectors[:, :kept] / values[:kept].sqrt()).T @ rows
    mean = (n * subspace.mean + model) / (n + 1)
    return replace(subspace, num_models=n + 1, mean=mean, basis=basis, values=values[:kept])
