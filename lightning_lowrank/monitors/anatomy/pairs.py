"""Inputs of a layer and gradients of its outputs, row by row, of one sample of rows: the gradient of its weight is
their product.

Shape letters:  T rows of one call   R rows that are kept   N inputs   M outputs   K probes   C channels   H, W an image
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lowrank.maths.spectra.spectrum import full_precision
from lightning_lowrank.models.axes import feature_axis, is_transposed
from lightning_lowrank.models.taps import Listener, Timed, in_training, recomputes

# Random directions in which the product of all rows is kept, to be held against the gradient.
PROBES = 8


@dataclass
class HeardCall:
    """One call of a layer.

    Attributes:
        keys: Random numbers of the rows that are kept: those with the largest ones stay.
        places: Which rows they are.
        count: How many rows there were.
        inputs: Those that are kept.
        probed: Of all rows, products of the inputs with the probes.
        signals: Gradients of the same outputs, once the backward pass came by.
    """

    keys: Float[Tensor, " R"]
    places: Int[Tensor, " R"]
    count: int
    inputs: Float[Tensor, "R N"]
    probed: Float[Tensor, "T K"]
    signals: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """Rows of both sides.

    Attributes:
        inputs: What came in.
        signals: The gradient in what came out, in the same rows.
        num_rows: How many there were in all.
        product: Of all rows, the product of both sides, times the probes.
        probes: Those.
    """

    inputs: Float[Tensor, "R N"]
    signals: Float[Tensor, "R M"]
    num_rows: int
    product: Float[Tensor, "M K"]
    probes: Float[Tensor, "N K"]


class PairTap:
    """Observes all layers that share a weight, from the first batch of a sample until its gradient is final.

    Rows are drawn in the forward pass, with keys from a generator on the host, so nothing waits for the device. A call
    counts once the backward pass has passed its output. Under activation checkpointing, the second run of a layer
    therefore counts exactly if the first one had no graph.

    Sometimes a hook computes the layer's weight before each call (pruning, the older weight and spectral norm). Then
    the gradient is that of the computed weight, summed over the calls. The two sides form this gradient, and the
    optimizer's gradient is derived from it.

    Args:
        weight: The weight that the optimizer steps.
        layers: All layers that multiply by it, or by a weight computed from it.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        layers: Sequence[nn.Module],
    ) -> None:
        self.weight, self.layers = weight, layers
        self._timed: Timed = nullcontext
        self._max_rows = 0
        self._error: Exception | None = None
        self.gradient: Tensor | None = None
        self._listener = Listener(self._hear, again=True)
        self._listener.layers = {str(i): layer for i, layer in enumerate(layers)}
        self._begin(0)

    def _begin(self, seed: int) -> None:
        self._calls: list[HeardCall] = []
        self._draws = torch.Generator("cpu").manual_seed(seed)
        self._top = torch.empty(0, dtype=torch.float64, device="cpu")
        self._probes: Tensor | None = None
        self._product: Tensor | None = None
        self._of_computed: Tensor | None = None
        self.gradient, self._error = None, None

    @property
    def error(self) -> Exception | None:
        """The failure in this sample."""
        self._error = self._error or self._listener.take_error()
        return self._error

    def attach(self, seed: int, max_rows: int, timed: Timed = nullcontext) -> None:
        """Listen to a batch, to a new sample if the last one is over.

        Args:
            seed: Of rows and probes.
            max_rows: How many rows are kept.
            timed: Counts the time that it takes.
        """
        self._timed = timed
        self._max_rows = max_rows
        if self.gradient is not None or self._probes is None:
            self._begin(seed)
        self._outside = False
        self._listener.attach(timed)

    def detach(self) -> None:
        """The batch is over: what the backward pass never came by is forgotten."""
        self._listener.detach()
        self._calls = [call for call in self._calls if call.signals is not None]
        for call in self._calls:  # their product is known
            call.probed = call.probed[:0]

    def close(self) -> None:
        """The gradient is final: what comes later belongs to another step."""
        if self.weight.grad is not None:
            self.gradient = (self.weight.grad if self._of_computed is None else self._of_computed).detach().clone()

    def take(self) -> Pairs | None:
        """The recorded rows; None if there are none. Then it is ready for another sample."""
        calls = [call for call in self._calls if call.signals is not None and call.count]
        product, probes = self._product, self._probes
        self._calls, self._probes, self._product = [], None, None
        if not calls or product is None or probes is None:
            return None
        # In random order, so that the first ones are a sample too.
        keep = torch.cat([call.keys for call in calls]).argsort(descending=True)[: self._max_rows].to(probes.device)
        sides = [
            torch.cat([part.float() for part in parts])[keep]
            for parts in zip(*((c.inputs, c.signals) for c in calls), strict=True)
        ]
        return Pairs(sides[0], sides[1], sum(call.count for call in calls), product, probes)

    @property
    def is_computed(self) -> bool:
        """Whether the layers multiply by what is computed from the weight."""
        return all(layer._parameters.get("weight") is not self.weight for layer in self.layers)

    def probes(self) -> Float[Tensor, "N K"]:
        """Entries of the weight in the order of its matrix, so that the product with probes has no rows to unfold."""
        weight = as_matrix(self.layers[0], self.weight)
        draws = torch.Generator(weight.device).manual_seed(self._draws.initial_seed())
        return torch.randn(weight.shape[1], PROBES, generator=draws, dtype=torch.float32, device=weight.device)

    def drop(self) -> None:
        """Drop the unfinished sample."""
        self.detach()
        self._begin(0)

    def _least(self) -> float | Tensor:
        """The smallest key that is among the largest ones."""
        return self._top[-1] if len(self._top) == self._max_rows else 0.0

    def _hear(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if self.gradient is not None or not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        if recomputes() and self._outside:
            return
        self._outside |= not recomputes()
        if not inputs:
            raise ValueError(
                f"a {type(layer).__name__} is called with keyword arguments; pass its input by position, as in layer(x)"
            )
        with full_precision(output.device):
            call = self._call(layer, inputs[0].detach(), output)
        with torch._C.DisableTorchFunction():  # nobody need know of it
            output.register_hook(partial(self._answer, layer, call))
            used = getattr(layer, "weight", None) if self.is_computed else None
            if isinstance(used, Tensor) and used.requires_grad:
                used.register_hook(self._add_gradient)
        self._calls.append(call)

    def _call(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> HeardCall:
        if self._probes is None:
            self._probes = self.probes()
        probed = of_inputs(layer, inputs.float(), self._probes)
        # Before any place is looked up: an index out of range ends a run on a GPU.
        if len(probed) * as_matrix(layer, self.weight).shape[0] != output.numel():
            raise ValueError(
                f"a {type(layer).__name__} has a custom forward, whose outputs differ from those of such a layer"
            )
        keys = torch.rand(len(probed), generator=self._draws, dtype=torch.float64, device="cpu")
        together = torch.cat([self._top, keys])
        self._top = together.topk(min(self._max_rows, len(together))).values
        places = (keys >= self._least()).nonzero()[:, 0]
        there = places.to(inputs.device)
        return HeardCall(keys[places], there, len(keys), input_rows(layer, inputs, output, there), probed)

    def _add_gradient(self, gradient: Tensor) -> None:
        if self.gradient is None and self._probes is not None and in_training():
            with self._timed():
                gradient = gradient.detach()
                self._of_computed = gradient.clone() if self._of_computed is None else self._of_computed + gradient

    def _answer(self, layer: nn.Module, call: HeardCall, gradient: Tensor) -> None:
        if self.gradient is not None or self._probes is None or not in_training():
            return
        with self._timed():
            try:
                with full_precision(gradient.device):
                    rows = output_rows(layer, gradient.detach())
                    product, some = rows.float().mT @ call.probed, rows[call.places]
                    self._product = product if self._product is None else self._product + product
                    # A graph that is kept may be gone through again: its gradients add up.
                    call.signals = some if call.signals is None else call.signals + some
            except Exception as error:  # this runs inside the user's backward pass
                self._error = error.with_traceback(None)


def of_inputs(layer: nn.Module, inputs: Tensor, weights: Float[Tensor, "N K"]) -> Float[Tensor, "T K"]:
    """The output of the layer with such weights and no bias, as rows."""
    if _is_linear(layer):
        return inputs.reshape(-1, inputs.shape[-1]) @ weights
    kernel = weights.mT.unflatten(1, (-1, *_kernel(layer)))
    return _flat(F.conv2d(_padded(layer, inputs), kernel, stride=_pair(layer.stride), dilation=_pair(layer.dilation)))


def input_rows(layer: nn.Module, inputs: Tensor, output: Tensor, places: Int[Tensor, " R"]) -> Float[Tensor, "R N"]:
    """The inputs that the weight multiplies at some places of the output, as a copy."""
    if _is_linear(layer):
        return inputs.reshape(-1, inputs.shape[-1])[places]
    image, (height, width) = _padded(layer, inputs), _image(layer, output).shape[-2:]
    example, line, column = places // (height * width), places // width % height, places % width
    (down, right), (tall, wide), (apart, beside) = _pair(layer.stride), _kernel(layer), _pair(layer.dilation)
    lines = line[:, None] * down + torch.arange(tall, device=places.device) * apart
    columns = column[:, None] * right + torch.arange(wide, device=places.device) * beside
    # [R, H, W, C], for the indices stand on both sides of the channels.
    patches = image[example[:, None, None], :, lines[:, :, None], columns[:, None, :]]
    return patches.movedim(-1, 1).flatten(1)


def output_rows(layer: nn.Module, gradient: Tensor) -> Float[Tensor, "T M"]:
    """One row for each place."""
    rows = gradient.movedim(feature_axis(layer, gradient.shape), -1)
    return rows.reshape(-1, rows.shape[-1])


def is_heard(layer: nn.Module) -> bool:
    """Whether its weight's gradient is a product of rows: linear layers, convolutions over lines and images without
    groups.
    """
    return _is_linear(layer) or (isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1)


def as_matrix(layer: nn.Module, weight: Tensor) -> Float[Tensor, "M N"]:
    """A weight, or its gradient, with a row for each output."""
    return weight.mT if is_transposed(layer) else weight.flatten(1)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def _flat(image: Float[Tensor, "B C H W"]) -> Float[Tensor, "T C"]:
    return image.movedim(1, -1).reshape(-1, image.shape[1])


def _image(layer: Any, tensor: Tensor) -> Float[Tensor, "B C H W"]:
    """With an axis for examples and two for places, whatever the layer's are."""
    axes = len(layer.kernel_size)
    batch = tensor if tensor.ndim == axes + 2 else tensor[None]
    return batch if axes == 2 else batch.unsqueeze(-2)


def _padded(layer: Any, inputs: Tensor) -> Float[Tensor, "B C H W"]:
    axes = len(layer.kernel_size)
    batch = inputs if inputs.ndim == axes + 2 else inputs[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return _image(layer, F.pad(batch, layer._reversed_padding_repeated_twice, mode=mode))


def _pair(numbers: Any) -> tuple[int, int]:
    return (1, *numbers) if len(numbers) == 1 else tuple(numbers)


def _kernel(layer: Any) -> tuple[int, int]:
    return _pair(layer.kernel_size)
