"""Dense Hessians, Jacobians and Gauss-Newton matrices in double precision, by autograd alone."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tests.independent.trainings import Module, Run

# Rows of a matrix at once.
CHUNK = 128


@dataclass(frozen=True)
class Dense:
    """A loss at some weights.

    Attributes:
        names: Of the parameters that it is differentiated by.
    """

    module: Module
    batch: list[Tensor]
    names: list[str]

    @classmethod
    def of(cls, run: Run, weights: dict[str, Tensor], batch: list[Tensor], names: list[str]) -> "Dense":
        module = run.at(weights, torch.float64).eval()
        return cls(module, [part.double() if part.is_floating_point() else part for part in batch], names)

    @cached_property
    def parameters(self) -> list[Tensor]:
        named = dict(self.module.named_parameters())
        return [named[name] for name in self.names]

    @cached_property
    def sizes(self) -> list[int]:
        return [parameter.numel() for parameter in self.parameters]

    def flat(self, tensors: list[Tensor]) -> np.ndarray:
        return torch.cat([tensor.detach().flatten() for tensor in tensors]).double().numpy()

    @cached_property
    def gradient(self) -> np.ndarray:
        return self.flat(list(torch.autograd.grad(self.module.loss(self.batch), self.parameters)))

    @cached_property
    def hessian(self) -> np.ndarray:
        slopes = torch.autograd.grad(self.module.loss(self.batch), self.parameters, create_graph=True)
        found = self._rows(torch.cat([slope.flatten() for slope in slopes]))
        return (found + found.T) / 2

    @cached_property
    def logits(self) -> Tensor:
        found = self.module.net(self.batch[0])
        return found.reshape(-1, found.shape[-1])

    @cached_property
    def jacobian(self) -> np.ndarray:
        """Rows, outputs, parameters."""
        return self._rows(self.logits.flatten()).reshape(*self.logits.shape, -1)

    @cached_property
    def chances(self) -> np.ndarray:
        return self.logits.detach().softmax(-1).numpy()

    @cached_property
    def labels(self) -> np.ndarray:
        """One-hot."""
        return np.eye(self.logits.shape[1])[self.batch[1].flatten().numpy()]

    @cached_property
    def gauss_newton(self) -> np.ndarray:
        root = self.gauss_newton_root
        return root.T @ root

    @cached_property
    def gauss_newton_root(self) -> np.ndarray:
        """Of all rows and outputs, `sqrt(p) (J - mean of J under p)`."""
        weights = self.chances[:, :, None]
        centred = self.jacobian - (weights * self.jacobian).sum(1, keepdims=True)
        return (np.sqrt(weights / len(weights)) * centred).reshape(-1, centred.shape[-1])

    def fisher(self, targets: np.ndarray) -> np.ndarray:
        """At one-hot targets: gradients of the rows' losses, outer products added up."""
        slopes = np.einsum("rc,rcp->rp", self.chances - targets, self.jacobian)
        return slopes.T @ slopes / len(slopes)

    def _rows(self, outputs: Tensor) -> np.ndarray:
        given = {"retain_graph": True, "materialize_grads": True, "allow_unused": True, "is_grads_batched": True}
        rows = []
        for some in torch.eye(len(outputs), dtype=outputs.dtype).split(CHUNK):
            parts = torch.autograd.grad(outputs, self.parameters, some, **given)
            rows.append(torch.cat([part.flatten(1) for part in parts], 1))
        return torch.cat(rows).numpy()
