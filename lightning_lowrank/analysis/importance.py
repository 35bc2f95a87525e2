"""What heads and neurons of a trained network matter, by exact gates on real data."""

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
    """What the units of one layer matter.

    Attributes:
        name: Of the layer that reads the units.
        kind: "head" or "neuron".
        values: Mean over batches of `|dL / d gate|`, of each unit: to first order, what the mean loss of a batch
            changes by when the unit is left out. Gradients of a batch are summed over its examples before the absolute
            value is taken, so that examples of opposite sign cancel.
    """

    name: str
    kind: str
    values: Float[Tensor, " n"]

    @property
    def top_share(self) -> float:
        """What the largest tenth of the units has of the sum; NaN where that is 0."""
        top = self.values.sort(descending=True).values[: max(1, len(self.values) // 10)]
        return float(top.sum() / self.values.sum()) if self.values.sum() > 0 else math.nan


def importance(module: nn.Module, batches: Iterable[Any], measure: Measure) -> list[Importance]:
    """Heads and neurons of a network, with what they matter on average.

    Cost: a forward and a backward pass per batch.

    Args:
        module: With its weights; it is left in evaluation mode, without gradients.
        batches: At least one.
        measure: Gives a "loss".

    Raises:
        ValueError: There are neither heads nor neurons, no batches, or no "loss".

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
            raise ValueError(f'the measure gave {list(found_here)}; what is expected is a "loss" among them')
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
