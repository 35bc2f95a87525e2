"""The importance of a unit: the exact gradient of the loss with respect to a gate on it. It is computed from the weight
that reads the unit and that weight's gradient.

With `y = W (xi * h) + b` and one gate per block of inputs, the derivative of the loss at gate 1 is `<W, dL/dW>` over
the columns that read the block. It needs no hook and no second pass, whatever the other layers are. An attention head
is a block of the output projection's inputs, a neuron one input of the layer that follows its activation, a channel one
input of a convolution.

Shape letters:  G units, blocks of equal length along an axis of the weight
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype


def gate_gradients(
    weight: Num[Tensor, "..."], gradient: Num[Tensor, "..."], num_gates: int, axis: int = 1
) -> Float[Tensor, " G"]:
    """Derivative of the loss by a gate on each block of a linear layer's inputs, at gates of 1.

    Summed over the batch as the gradient is: examples of opposite sign cancel. A layer that is used several times has
    one gate for all.

    Args:
        weight: Its inputs lie along the axis: 1 of linear layers and convolutions, 0 of transformers' `Conv1D`.
        gradient: Of the loss, by the weight.
        num_gates: How many blocks.
        axis: Of the inputs.

    Examples:
        >>> gate_gradients(torch.ones(3, 4), torch.eye(3, 4), 2)
        tensor([2., 1.], dtype=torch.float64)
    """
    with full_precision(weight.device):
        return (blocks(weight, num_gates, axis) * blocks(gradient, num_gates, axis)).sum(1)


def energies(tensor: Num[Tensor, "..."], num_units: int = 1, axis: int = 0) -> Float[Tensor, " G"]:
    """Mean square of the entries of each unit: free of its size."""
    with full_precision(tensor.device):
        return blocks(tensor, num_units, axis).square().mean(1)


def blocks(tensor: Num[Tensor, "..."], count: int, axis: int) -> Float[Tensor, "G _"]:
    """The entries of each of so many equal blocks along an axis."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tensor.movedim(axis, 0).reshape(count, -1).to(working_dtype(tensor.device))
