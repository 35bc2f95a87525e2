"""Losses as functions of the model's outputs: their Hessian there and, in closed form, its root and gradients with that
covariance.

The logits of a language model are large: nothing here differentiates through a softmax, and nothing is kept but
probabilities.

Shape letters:  R rows of outputs: examples times positions   C columns: classes, or what is predicted at a position
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import ratio


@dataclass(frozen=True)
class OutputLoss(ABC):
    """A loss as a function of the outputs that it was computed from.

    All products are in the dtype of the outputs, in float32 at least, and on no graph.

    Attributes:
        given: The outputs as the loss took them, with the graph that made them.
        as_rows: Makes rows of a tensor of their shape, one per position that is predicted.
    """

    given: Float[Tensor, "..."]
    as_rows: Callable[[Tensor], Float[Tensor, "R C"]]

    @cached_property
    def outputs(self) -> Float[Tensor, "R C"]:
        """One row per position, on the graph."""
        with torch.enable_grad():
            return self.as_rows(self.given)

    @property
    def num_rows(self) -> int:
        """Positions, those that the loss ignores too."""
        return len(self.outputs)

    @abstractmethod
    def value(self) -> Float[Tensor, ""]:
        """The loss."""

    @abstractmethod
    def gradient(self) -> Float[Tensor, "R C"]:
        """Derivative of the loss by the outputs."""

    @abstractmethod
    def hessian_product(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        """Product with H, the Hessian of the loss in the outputs."""

    def labels(self) -> Float[Tensor, "R C"] | None:
        """The target of each row: shares of the classes, or values; None if the loss does not tell."""
        return None

    @property
    def counted(self) -> Bool[Tensor, " R"]:
        """Rows that have a share in the loss."""
        return self._counts() > 0

    def _counts(self) -> Float[Tensor, " R"]:
        """1 for rows that have a share in the loss, 0 for others."""
        return self._values.new_ones(self.num_rows)

    @cached_property
    def _values(self) -> Float[Tensor, "R C"]:
        """The outputs as numbers."""
        return self.outputs.detach().to(torch.promote_types(self.outputs.dtype, torch.float32))


@dataclass(frozen=True)
class ClosedForm(OutputLoss, ABC):
    """A convex loss of a model that says how probable targets are: its Hessian has a root, and is the covariance of
    gradients.
    """

    @abstractmethod
    def factor_product(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        """Product with L, where L L^T = H."""

    @abstractmethod
    def factor_transposed_product(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        """Product with L^T."""

    @abstractmethod
    def sampled_gradients(self, generator: torch.Generator) -> Float[Tensor, "R C"]:
        """Gradients of the rows' own losses at targets that are drawn from the model, scaled as `row_gradients` are.

        The mean over rows of their outer products is H in expectation, block by block.
        """

    @abstractmethod
    def row_weights(self) -> Float[Tensor, " R"]:
        """How much each row counts in the loss: with w its weight and l its own loss, the loss is the sum of w l.

        1 / R under `reduction="mean"`, 1 under "sum", 0 for rows that are ignored. The weight of a row of several
        numbers is the sum of theirs, so that its own loss is their mean.
        """

    def row_gradients(self) -> Float[Tensor, "R C"]:
        """Gradients of the rows' own losses at the targets that were given, times sqrt(R w), where w is `row_weights`.

        The mean over rows of their outer products is the sum of w g g^T. Like H, it grows with the loss, whatever the
        reduction and the shape in which the loss was called. NaN where a weight is negative.
        """
        return ratio(self.gradient(), (self.row_weights() / self.num_rows).sqrt()[:, None])


@dataclass(frozen=True)
class Differentiated(OutputLoss):
    """Any loss at all, by double backward from the loss to outputs that were captured on the way.

    Attributes:
        loss: With its graph.
        scale: What the loss has been multiplied by.
    """

    loss: Float[Tensor, ""]
    scale: Float[Tensor, ""] | float

    def value(self) -> Float[Tensor, ""]:
        return self.loss.detach() / self.scale

    def gradient(self) -> Float[Tensor, "R C"]:
        return self._rows(self._slope.detach())

    def hessian_product(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        if not self._slope.requires_grad:  # a loss that is linear
            return torch.zeros_like(rows)
        along = rows.reshape(self.given.shape).to(self._slope.dtype)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        (product,) = torch.autograd.grad(self._slope, self.given, along, **options)
        return self._rows(product)

    @cached_property
    def _slope(self) -> Tensor:
        return torch.autograd.grad(self.loss, self.given, create_graph=True)[0]

    def _rows(self, slopes: Tensor) -> Float[Tensor, "R C"]:
        return slopes.reshape(self.outputs.shape).to(self._values.dtype) / self.scale


@dataclass(frozen=True)
class CrossEntropy(ClosedForm):
    """Sum over rows of -t log softmax(outputs), where t are a row's soft targets times its share in the loss.

    Attributes:
        mass: Sum of each row's t.
        targets: Makes all t: as large as the outputs, so not kept.
    """

    mass: Float[Tensor, "R 1"]
    targets: Callable[[], Float[Tensor, "R C"]]

    def value(self) -> Float[Tensor, ""]:
        targets = self.targets()
        # A class that is masked out has a logarithm of -inf.
        return -torch.where(targets == 0, 0.0, targets * self._values.log_softmax(-1)).sum()

    def gradient(self) -> Float[Tensor, "R C"]:
        return self.mass * self._probabilities - self.targets()

    def labels(self) -> Float[Tensor, "R C"]:
        return ratio(self.targets(), self.mass)

    def hessian_product(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        weighted = self._probabilities * rows
        return self.mass * (weighted - self._probabilities * weighted.sum(-1, keepdim=True))

    def factor_product(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        # L = diag(sqrt p) - p sqrt(p)^T
        weighted = self._probabilities.sqrt() * rows
        return self.mass.sqrt() * (weighted - self._probabilities * weighted.sum(-1, keepdim=True))

    def factor_transposed_product(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        means = (self._probabilities * rows).sum(-1, keepdim=True)
        return (self.mass * self._probabilities).sqrt() * (rows - means)

    def sampled_gradients(self, generator: torch.Generator) -> Float[Tensor, "R C"]:
        drawn = torch.multinomial(self._probabilities, 1, generator=generator)
        hits = torch.zeros_like(self._probabilities).scatter_(1, drawn, 1.0)
        return (self.mass * self.num_rows).sqrt() * (self._probabilities - hits)

    def row_weights(self) -> Float[Tensor, " R"]:
        return self.mass[:, 0]

    def _counts(self) -> Float[Tensor, " R"]:
        return (self.mass[:, 0] != 0).to(self.mass)

    @cached_property
    def _probabilities(self) -> Float[Tensor, "R C"]:
        return self._values.softmax(-1)


@dataclass(frozen=True)
class Entrywise(ClosedForm, ABC):
    """A sum over entries, each a function of one output: its Hessian is diagonal.

    Attributes:
        targets: One per entry.
        shares: What each entry's loss is multiplied by.
    """

    targets: Float[Tensor, "R C"]
    shares: Float[Tensor, "R C"]

    @property
    @abstractmethod
    def _curvature(self) -> Float[Tensor, "R C"]:
        """The diagonal."""

    def labels(self) -> Float[Tensor, "R C"]:
        return self.targets

    def hessian_product(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        return self._curvature * rows

    def factor_product(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        return self._curvature.sqrt() * rows

    def factor_transposed_product(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        return self.factor_product(rows)

    def row_weights(self) -> Float[Tensor, " R"]:
        return self.shares.sum(-1)

    def _counts(self) -> Float[Tensor, " R"]:
        return (self.shares != 0).any(-1).to(self.shares)


@dataclass(frozen=True)
class SquaredError(Entrywise):
    """Squared differences; its model is a Gaussian around each output, of the width that makes the loss its negative
    log likelihood.
    """

    def value(self) -> Float[Tensor, ""]:
        return (self.shares * (self._values - self.targets).square()).sum()

    def gradient(self) -> Float[Tensor, "R C"]:
        return self._curvature * (self._values - self.targets)

    def sampled_gradients(self, generator: torch.Generator) -> Float[Tensor, "R C"]:
        drawn = torch.randn(
            self._values.shape, generator=generator, dtype=self._values.dtype, device=self._values.device
        )
        return (self.num_rows * self._curvature).sqrt() * drawn

    @cached_property
    def _curvature(self) -> Float[Tensor, "R C"]:
        return 2 * self.shares


@dataclass(frozen=True)
class BinaryCrossEntropy(Entrywise):
    """-a log sigmoid(output) - b log(1 - sigmoid(output)), where a and b are given by the target and the weight of
    positives.

    Attributes:
        positives: What the part of the loss for positives is multiplied by.
    """

    positives: Float[Tensor, "R C"]

    def value(self) -> Float[Tensor, ""]:
        softplus = torch.nn.functional.softplus
        on, off = self._sides
        return (on * softplus(-self._values) + off * softplus(self._values)).sum()

    def gradient(self) -> Float[Tensor, "R C"]:
        on, off = self._sides
        return off * self._probabilities - on * (1 - self._probabilities)

    def sampled_gradients(self, generator: torch.Generator) -> Float[Tensor, "R C"]:
        on, off = self._sides
        hits = torch.bernoulli(self._probabilities, generator=generator)
        return (self.num_rows * (on + off)).sqrt() * (self._probabilities - hits)

    @cached_property
    def _curvature(self) -> Float[Tensor, "R C"]:
        on, off = self._sides
        return (on + off) * self._probabilities * (1 - self._probabilities)

    @cached_property
    def _probabilities(self) -> Float[Tensor, "R C"]:
        return self._values.sigmoid()

    @property
    def _sides(self) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C"]]:
        """What the losses of a positive and of a negative are multiplied by."""
        return self.shares * self.targets * self.positives, self.shares * (1 - self.targets)
