"""From a call of one of torch's loss functions to what the loss is as a function of the model's outputs.

Shape letters:  R rows of outputs: examples times positions   C columns: classes, or what is predicted at a position
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lightning_lowrank.loss.output_loss import BinaryCrossEntropy, ClosedForm, CrossEntropy, SquaredError


@dataclass(frozen=True)
class LossCall:
    """A loss function of torch, what it was called with, and the loss that it gave, alive."""

    function: Callable[..., Tensor]
    inputs: Tensor
    target: Tensor
    options: Mapping[str, Any]
    loss: Tensor

    @classmethod
    def of(
        cls, function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any], loss: Tensor
    ) -> "LossCall":
        """One with all arguments by name, those with the values that they have anyway left out."""
        options = inspect.signature(function).bind(*args, **kwargs).arguments
        inputs, target = options.pop("input"), options.pop("target")
        return cls(
            function, inputs, target, {name: value for name, value in options.items() if value is not None}, loss
        )

    @property
    def name(self) -> str:
        """Name of the function, as users know it."""
        return f"F.{self.function.__name__}"

    def as_output_loss(self, slope: Tensor) -> ClosedForm:
        """The loss of a training step as a function of the outputs in this call.

        Args:
            slope: Derivative of the step's loss by what this call gave: of its shape, and constant.

        Raises:
            ValueError: Not known for these arguments; the message is the reason.
        """
        if not self.inputs.requires_grad or self.target.requires_grad:
            raise ValueError(
                f"{self.name} was called with targets that depend on the parameters, or with outputs that do not"
            )
        if {"size_average", "reduce"} & self.options.keys():
            raise ValueError(
                f"{self.name} was called with size_average or reduce, which torch has replaced by reduction"
            )
        return FORMS[self.function](self.inputs, self.target, slope.detach(), **self.options)


def _cross_entropy(
    inputs: Tensor,
    target: Tensor,
    slope: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> CrossEntropy:
    outputs = _rows_of_classes(inputs.detach())
    weight = outputs.new_ones(outputs.shape[1]) if weight is None else weight
    weight, slope = (tensor.detach().to(_wide(inputs)) for tensor in (weight, slope))
    if target.shape == inputs.shape:
        share = slope / len(outputs) if reduction == "mean" else slope
        wanted = _rows_of_classes(target.to(weight))
        make = partial(_soft_targets, wanted, weight, share.reshape(-1).expand(len(outputs)), label_smoothing)
        return CrossEntropy(inputs, _rows_of_classes, make().sum(-1, keepdim=True), make)
    index = target.reshape(-1)
    counts = index != ignore_index
    index = torch.where(counts, index, 0)
    total = (weight[index] * counts).sum() if reduction == "mean" else 1.0
    share = torch.where(counts, slope.reshape(-1) / total, 0.0)
    make = partial(_hard_targets, index, weight, share, label_smoothing)
    mass = share * ((1 - label_smoothing) * weight[index] + label_smoothing * weight.mean())
    return CrossEntropy(inputs, _rows_of_classes, mass[:, None], make)


def _nll(inputs: Tensor, target: Tensor, slope: Tensor, **options: Any) -> CrossEntropy:
    """The softmax of logarithms of probabilities is those probabilities: they can stand for the logits that they came
    from.
    """
    sums = inputs.detach().to(_wide(inputs)).logsumexp(1 if inputs.ndim > 1 else 0)
    if not bool((sums.abs() < torch.finfo(inputs.dtype).eps ** 0.5).all()):
        raise ValueError("the inputs of F.nll_loss were not logarithms of probabilities")
    return _cross_entropy(inputs, target, slope, **options)


def _mse(
    inputs: Tensor, target: Tensor, slope: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> SquaredError:
    wanted, weights = (_like(inputs, tensor) for tensor in (target, weight))
    total = weights.sum() if reduction == "mean" else 1.0
    shares = slope.to(weights) * weights / total
    return SquaredError(inputs, rows_of, rows_of(wanted), rows_of(shares))


def _binary_cross_entropy(
    inputs: Tensor,
    target: Tensor,
    slope: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> BinaryCrossEntropy:
    wanted, weights, positives = (_like(inputs, tensor) for tensor in (target, weight, pos_weight))
    shares = slope.to(weights) * weights / (inputs.numel() if reduction == "mean" else 1)
    return BinaryCrossEntropy(inputs, rows_of, rows_of(wanted), rows_of(shares), rows_of(positives))


FORMS: dict[Callable[..., Tensor], Callable[..., ClosedForm]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll,
    F.mse_loss: _mse,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
}


def _hard_targets(
    index: Int[Tensor, " R"], weight: Float[Tensor, " C"], share: Float[Tensor, " R"], smoothing: float
) -> Float[Tensor, "R C"]:
    spread = share[:, None] * weight * (smoothing / len(weight))
    return spread.scatter_add(1, index[:, None], ((1 - smoothing) * share * weight[index])[:, None])


def _soft_targets(
    wanted: Float[Tensor, "R C"], weight: Float[Tensor, " C"], share: Float[Tensor, " R"], smoothing: float
) -> Float[Tensor, "R C"]:
    return share[:, None] * weight * (wanted * (1 - smoothing) + smoothing / len(weight))


def _rows_of_classes(tensor: Tensor) -> Float[Tensor, "R C"]:
    """Rows of a tensor whose classes lie along its second axis, or its only one."""
    return tensor[None] if tensor.ndim == 1 else tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


def rows_of(tensor: Tensor) -> Float[Tensor, "R C"]:
    """Rows of something that has what is predicted at a position along its last axis; a vector is one number per
    example.
    """
    return tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)


def _like(inputs: Tensor, tensor: Tensor | None) -> Tensor:
    """In the shape of the outputs; ones for nothing."""
    if tensor is None:
        return torch.ones_like(inputs, dtype=_wide(inputs), requires_grad=False).detach()
    if torch.broadcast_shapes(tensor.shape, inputs.shape) != inputs.shape:
        raise ValueError(
            f"the loss repeats its outputs, of shape {tuple(inputs.shape)}, along targets of shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor.detach().to(_wide(inputs)).expand_as(inputs)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
