"""Loss and accuracy along the straight line between two networks.

References:
    Frankle et al. (2020), "Linear mode connectivity and the lottery ticket hypothesis", Section 2, for the barrier.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lowrank.analysis.tasks import Measure, inputs, means

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Line:
    """Measures along a line.

    Attributes:
        places: From 0 (A) to 1 (B).
        values: One number at each place, by data set and quantity, such as "test/loss".
        barriers: By the same names: how far the curve rises above the straight line between its ends; for an accuracy,
            how far it falls below. The ends count, so a value below 0 is rounding.
    """

    places: list[float]
    values: dict[str, list[float]]
    barriers: dict[str, float]


def line(
    module: nn.Module,
    a: State,
    b: State,
    data: Mapping[str, Iterable[Any]],
    measure: Measure,
    *,
    points: int = 11,
    calibrate: str | None = None,
) -> Line:
    """Loss and other measures along the line from A to B, in evaluation mode.

    Args:
        module: The architecture.
        a: Weights and buffers by name.
        b: The same at the other end.
        data: Name -> batches.
        measure: `(module, batch) -> {name: mean over the batch}`; smaller is better for "loss", larger for everything
            else.
        points: At least 3.
        calibrate: Name of the data from which batch norms recompute their statistics at each place. Without this,
            networks with batch norms look unconnected (Jordan et al. 2023, "REPAIR").

    Raises:
        ValueError: There are too few points.
    """
    if points < 3:
        raise ValueError(f"points={points} must be at least 3, both ends included")
    places = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    rows: list[dict[str, float]] = []
    for place in places:
        state = between(a, b, place)
        if calibrate is not None:
            state |= _calibrated(module, state, data[calibrate])
        module.eval()
        rows.append(means(_With(module, state), data, measure))
    values = {name: [row[name] for row in rows] for name in rows[0]}
    signs = {name: 1 if name.endswith("loss") else -1 for name in values}
    return Line(places, values, {name: barrier(places, curve, signs[name]) for name, curve in values.items()})


def barrier(places: Sequence[float], curve: Sequence[float], sign: int = 1) -> float:
    """How far a curve rises above the straight line between its ends, or with sign -1 falls below.

    Examples:
        >>> barrier([0.0, 0.5, 1.0], [1.0, 3.0, 2.0])
        1.5
    """
    straight = [(1 - place) * curve[0] + place * curve[-1] for place in places]
    return max(sign * (value - below) for value, below in zip(curve, straight, strict=True))


def between(a: State, b: State, place: float) -> dict[str, Tensor]:
    """Interpolated weights; integer buffers keep the values of A."""
    return {
        name: torch.lerp(tensor, b[name].to(tensor), place) if tensor.is_floating_point() else tensor
        for name, tensor in a.items()
    }


class _With(nn.Module):
    """A module with other weights."""

    def __init__(self, module: nn.Module, state: State) -> None:
        super().__init__()
        self.__dict__["call"] = lambda *inputs, **named: functional_call(module, dict(state), inputs, named)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.__dict__["call"](*inputs, **named)


@torch.no_grad()
def _calibrated(module: nn.Module, state: State, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Statistics of batch norms, as averages over the batches."""
    norms = {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    if not norms:
        return {}
    before = {name: layer.momentum for name, layer in norms.items()}
    fresh = {
        f"{name}.{local}": torch.full_like(tensor, float(local == "running_var")) if tensor.ndim else tensor * 0
        for name, layer in norms.items()
        for local, tensor in layer.named_buffers()
    }
    module.eval()
    for layer in norms.values():
        layer.train()
        layer.momentum = None  # the plain average
    try:
        taken = {**state, **fresh}
        for batch in batches:
            functional_call(module, taken, (inputs(batch),))
    finally:
        module.eval()
        for name, layer in norms.items():
            layer.momentum = before[name]
    return {name: taken[name] for name in fresh}
