"""Measurements of classes of devices, and times of work that follow from them.

`python -m benchmarks.plan --calibrate NAME` measures this machine and writes it to `devices.json`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lowrank.analysis.planning.counting import Work
from lightning_lowrank.analysis.planning.rehearsal import SKETCH, Costs

TABLES = Path(__file__).parent / "devices.json"
Rates = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Device:
    """A class of devices.

    Attributes:
        what: Processor, threads and version of torch.
        products: Sides, and flops a second of Gram products of matrices of that short side.
        eigenvalues: Sides, and flops a second of their eigenvalues.
        sketch: Short sides, and flops a second of a sketch.
        sample_ms: Of a sample, whatever it reads.
        matrix_ms: Of each tensor that is read.
        side_ms: Of each short side of each source.
        element_ns: Of each number that is read.
        step_ms: Of a step of training, whatever it trains.
        parameter_ms: Of each parameter in a step.
        entry_ns: Of each entry of the parameters in a step, for the optimizer.
        byte_ns: Of each byte that a step reads or writes.
        training: Flops a second of the products of a step.
    """

    what: str
    products: Rates
    eigenvalues: Rates
    sketch: Rates
    sample_ms: float
    matrix_ms: float
    side_ms: float
    element_ns: float
    step_ms: float
    parameter_ms: float
    entry_ns: float
    byte_ns: float
    training: float

    def sample(self, costs: Costs) -> float:
        """Milliseconds of a sample on the process that has most to do; what moves between processes is not in it."""
        own = sum(self._seconds(route, work, flops) for (route, work), flops in costs.flops.items())
        fixed = self.sample_ms + self.matrix_ms * costs.tensors + self.side_ms * costs.sides
        return 1000 * own + fixed + 1e-6 * self.element_ns * costs.elements

    def decomposing(self, costs: Costs) -> float:
        """Milliseconds of products and solvers alone."""
        return 1000 * sum(self._seconds(route, work, flops) for (route, work), flops in costs.flops.items())

    def step(self, flops: float, num_bytes: float, num_tensors: int, num_parameters: int) -> float:
        """Milliseconds of a training step of so many tensors, with so many entries in all."""
        fixed = self.step_ms + self.parameter_ms * num_tensors
        return fixed + 1e-6 * (self.entry_ns * num_parameters + self.byte_ns * num_bytes) + 1000 * flops / self.training

    def _seconds(self, route: str, work: Work, flops: int) -> float:
        rates = self.sketch if route == SKETCH else self.products if work.kind == "products" else self.eigenvalues
        return flops / interpolated(rates, work.side)


def interpolated(rates: Rates, side: int) -> float:
    """Between two measured sides by powers; beyond them as at the last."""
    sides, values = zip(*rates, strict=True)
    return math.exp(float(np.interp(math.log(max(side, 1)), np.log(sides), np.log(values))))


def devices(table: Path = TABLES) -> dict[str, Device]:
    """Those that were measured, by name."""
    known: Mapping[str, Mapping[str, Any]] = json.loads(table.read_text(encoding="utf-8"))
    return {name: Device(**{key: _tuples(value) for key, value in fields.items()}) for name, fields in known.items()}


def _tuples(value: Any) -> Any:
    """Pairs as they were before they were JSON."""
    return [(side, float(rate)) for side, rate in value] if isinstance(value, list) else value


def write(name: str, device: Device, table: Path = TABLES) -> None:
    """Add a class of devices, or measure it anew."""
    known = {key: asdict(value) for key, value in devices(table).items()} if table.exists() else {}
    table.write_text(json.dumps(known | {name: asdict(device)}, indent=1) + "\n", encoding="utf-8")
