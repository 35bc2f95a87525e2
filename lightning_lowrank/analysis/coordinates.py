"""How the changes of each linear layer scale with the width: a short run at several widths, and fitted powers.

Shape letters:  R rows of inputs   M outputs, N inputs of a layer
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lowrank.analysis.architectures import called
from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.models.linear import linear_layers, matrix_of
from lightning_lowrank.models.names import tag
from lightning_lowrank.statistics.nuclear_to_spectral import nuclear_to_spectral

EXPECTED = (
    "(module, optimizer, batches, loss): the network, its optimizer, an iterable of batches, and loss(module, "
    "batch) -> scalar"
)
# Half of the least power of the width that theory knows, which is 1/2.
TOLERANCE = 0.25

# What is measured of a layer, with what it is.
QUANTITIES = {
    "own": "RMS of (W' - W) x'",
    "inherited": "RMS of W (x' - x)",
    "share": "own over size",
    "size": "RMS of W x",
    "weight_norm": "spectral norm of W over sqrt(M / N)",
    "update_norm": "spectral norm of W' - W over sqrt(M / N)",
    "gradient_nuclear_to_spectral": "nuclear over spectral norm of the first gradient",
}

Layers = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A network of some width, and how it is trained."""

    module: nn.Module
    optimizer: Optimizer
    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Power:
    """A power of the width, fitted by least squares to logarithms.

    Attributes:
        exponent: The slope; NaN if a value is 0 or not finite.
        error: Its standard error, which covers seeds and deviations from a power.
    """

    exponent: float
    error: float

    @property
    def verdict(self) -> str:
        """Whether the quantity grows, shrinks or is flat with width, within two errors to both sides."""
        low, high = self.exponent - 2 * self.error, self.exponent + 2 * self.error
        if math.isnan(self.exponent):
            return "no power"
        if low > TOLERANCE or high < -TOLERANCE:
            return "grows" if low > 0 else "shrinks"
        return "flat" if low >= -TOLERANCE and high <= TOLERANCE else "unclear"


def task_of(place: str, function: Callable[[int], Any], width: int) -> Task:
    """What the user's function returns.

    Raises:
        ValueError: It does not take a width, raises, or returns something else.
    """
    given = called(place, function, width)
    if not (isinstance(given, tuple) and len(given) == 4):
        raise ValueError(f"{place}({width}) returned a {type(given).__name__}; expected {EXPECTED}")
    module, optimizer, batches, loss = given
    if not (
        isinstance(module, nn.Module)
        and isinstance(optimizer, Optimizer)
        and isinstance(batches, Iterable)
        and callable(loss)
    ):
        kinds = ", ".join(type(one).__name__ for one in given)
        raise ValueError(f"{place}({width}) returned ({kinds}); expected {EXPECTED}")
    return Task(module, optimizer, batches, loss)  # type: ignore[arg-type]


def run(task: Task, steps: int, seed: int) -> Layers:
    """Train, and measure each linear layer at the start and at the end.

    Raises:
        ValueError: There is no batch, or no linear layer.
    """
    batches = list(islice(task.batches, steps))
    if not batches:
        raise ValueError("batches are empty")
    layers = {tag(name): layer for name, layer in linear_layers(task.module).items() if layer.weight.requires_grad}
    probe = partial(_inputs, task, layers, batches[0], seed)
    start, weights = probe(), {name: _weight(layer) for name, layer in layers.items()}
    gradients: dict[str, Tensor] = {}
    for batch in islice(cycle(batches), steps):
        task.optimizer.zero_grad()
        task.loss(task.module, batch).backward()
        gradients = gradients or {
            n: _weight(layer, "grad") for n, layer in layers.items() if layer.weight.grad is not None
        }
        task.optimizer.step()
    end = probe()
    known = [name for name in layers if name in start and name in gradients]
    if not known:
        raise ValueError(
            "no linear layer with an untied weight takes part in the forward pass; the linear layers are "
            f"{list(layers)[:10]}"
        )
    return {
        name: _measured(start[name], end[name], weights[name], _weight(layers[name]), gradients[name]) for name in known
    }


def power(points: Mapping[int, Sequence[float]]) -> Power:
    """The power of a quantity at each width, over several seeds."""
    x = np.log([width for width, values in points.items() for _ in values])
    values = np.array(list(chain.from_iterable(points.values())))
    if not (np.isfinite(values).all() and (values > 0).all()):
        return Power(math.nan, math.nan)
    x, y = x - x.mean(), np.log(values) - np.log(values).mean()
    slope = (x @ y) / (x @ x)
    return Power(float(slope), float(np.sqrt(((y - slope * x) ** 2).sum() / (len(x) - 2) / (x @ x))))


def powers(runs: Mapping[int, Sequence[Layers]]) -> dict[str, dict[str, Power]]:
    """Powers of each layer and quantity.

    Raises:
        ValueError: Layers of one width are not those of another.
    """
    names = {width: list(layers) for width, several in runs.items() for layers in several}
    first = next(iter(names.values()))
    for width, others in names.items():
        if others != first:
            raise ValueError(
                f"width {width} has other linear layers than the first width: {others[:10]} instead of {first[:10]}"
            )
    return {
        name: {
            quantity: power({width: [layers[name][quantity] for layers in several] for width, several in runs.items()})
            for quantity in QUANTITIES
        }
        for name in first
    }


def _inputs(task: Task, layers: Mapping[str, nn.Module], batch: Any, seed: int) -> dict[str, Float[Tensor, "R N"]]:
    """Rows that enter each layer, with the same random numbers at each call."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double())

    hooks = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        torch.manual_seed(seed)
        with torch.no_grad():
            task.loss(task.module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def _weight(layer: nn.Module, of: str = "data") -> Float[Tensor, "M N"]:
    values: Tensor = getattr(layer.weight, of)
    return matrix_of(layer, values.detach().double()).clone()


def _measured(
    x: Float[Tensor, "R N"],
    new_x: Float[Tensor, "R N"],
    weight: Float[Tensor, "M N"],
    new_weight: Float[Tensor, "M N"],
    gradient: Float[Tensor, "M N"],
) -> dict[str, float]:
    change, scale = new_weight - weight, math.sqrt(weight.shape[0] / weight.shape[1])
    own, size = _rms(new_x @ change.mT), _rms(x @ weight.mT)
    found = {
        "own": own,
        "inherited": _rms((new_x - x) @ weight.mT),
        "share": own / size,
        "size": size,
        "weight_norm": svd(weight).top / scale,
        "update_norm": svd(change).top / scale,
        "gradient_nuclear_to_spectral": nuclear_to_spectral(svd(gradient)),
    }
    return {name: float(value) for name, value in found.items()}


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()
