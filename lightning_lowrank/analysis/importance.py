"""Importance of the heads and neurons of a trained network, from exact gates on real data."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lowrank.analysis.tasks import Measure, inputs, measured
from lightning_lowrank.models.units import Units, heads_of, neurons_of
from lightning_lowrank.monitors.concentration.gates import gate_gradients


@dataclass(frozen=True)
class Importance:
    """Importance of the units of one layer.

    Attributes:
        name: Name of the layer that reads the units.
        kind: "head" or "neuron".
        values: Mean over batches of `|dL / d gate|` for each unit: to first order, the change of a batch's mean loss
            without the unit. Gradients are summed over the examples of a batch before the absolute value, so examples
            of opposite sign cancel.
    """

    name: str
    kind: str
    values: Float[Tensor, " n"]

    @property
    def top_share(self) -> float:
        """Share of the sum that the largest tenth of the units has; NaN if the sum is 0."""
        top = self.values.sort(descending=True).values[: max(1, len(self.values) // 10)]
        return float(top.sum() / self.values.sum()) if self.values.sum() > 0 else math.nan


def importance(module: nn.Module, batches: Iterable[Any], measure: Measure) -> list[Importance]:
    """Mean importance of the heads and neurons of a network.

    Cost: a forward and a backward pass per batch.

    Args:
        module: Network with its weights. It is left in evaluation mode, without gradients.
        batches: At least one.
        measure: Gives a "loss".

    Raises:
        ValueError: There are no heads or neurons, no batches, or no "loss".

    References:
        Michel, Levy & Neubig (2019), "Are sixteen heads really better than one?", equation 2.
    """
    heads = heads_of(module, {})
    found = {"head": heads, "neuron": neurons_of(module, None, list(heads))}
    if not heads and not found["neuron"]:
        raise ValueError(f"no attention heads and no hidden neurons were found in {type(module).__name__}")
    totals: dict[tuple[str, str], Tensor] = {}
    module.eval()
    count = 0
    for batch in batches:
        inputs(batch)
        module.zero_grad()
        found_here = measured(measure, module, batch)
        if "loss" not in found_here:
            raise ValueError(f'the measure returned {list(found_here)}; "loss" is missing')
        found_here["loss"].backward()
        count += 1
        for kind, layers in found.items():
            for name, units in layers.items():
                known = totals.get((kind, name), 0.0)
                totals[kind, name] = known + _gates(units).abs()
    module.zero_grad()
    if not count:
        raise ValueError("there are no batches")
    return [Importance(name, kind, total / count) for (kind, name), total in totals.items()]


def _gates(units: Units) -> Float[Tensor, " n"]:
    (weight,) = units.parameters
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return gate_gradients(weight, gradient, units.count, units.axis)
