"""Curves of `GaLore`: the gradient energy in its subspaces compared with chance and the best subspace, and the size of
its state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Numbers, NumberSource, Quantity, led_by
from lightning_lowrank.measuring.source import Step
from lightning_lowrank.methods.galore.matrix import LowRankMatrix
from lightning_lowrank.methods.galore.steps import LowRankSteps
from lightning_lowrank.models.training import Training

CORE = ("galore_captured", "galore_captured_best", "galore_captured_random", "galore_state_bytes")
PER_SITE = ("captured", "captured_best", "captured_random", "staleness", "overlap", "overlap_random")
WHOLE = (("state_bytes", "bytes"), ("refresh_time_ms", "ms"), ("refreshes", "1"))


class GaLoreNumbers(NumberSource):
    """Energies in the subspaces of the gradients that the optimizer got, and changes by refreshes.

    Args:
        steps: The act that has the matrices.
    """

    name = "galore"
    of_parameters = True

    def __init__(self, steps: LowRankSteps) -> None:
        self._steps = steps
        sites = [Quantity(f"galore_{name}", per_site=True) for name in PER_SITE]
        self.quantities = led_by(CORE, [*sites, *(Quantity(f"galore_{name}", unit) for name, unit in WHOLE)])
        self._found: list[Numbers] = []

    def plan(self, training: Training) -> None:
        """Read the trained matrices."""

    def labels(self) -> list[str]:
        """One label for each stepped matrix, and one for the whole model."""
        return [WHOLE_MODEL, *(matrix.name for matrix in self._steps.stepped())]

    def step_done(self, step: Step) -> list[object]:  # type: ignore[override]
        """Read gradients and bases of the step."""
        for key, matrix in self._steps.matrices.items():
            if key in step.parameters and matrix.parameter.grad is not None:
                self._found.append(Numbers(matrix.name, _of_matrix(matrix, matrix.parameter.grad)))
        return []

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of the step, and the size of the state of all matrices."""
        found, self._found = self._found, []
        return [Numbers(WHOLE_MODEL, self._of_all()), *found]

    def detach(self) -> None:
        """Drop an unfinished sample."""
        self._found = []

    def _of_all(self) -> dict[str, Tensor]:
        matrices = self._steps.stepped()
        values = {
            "galore_state_bytes": float(sum(map(self._steps.bytes_of, matrices))),
            "galore_refresh_time_ms": 1000 * sum(matrix.take_seconds() for matrix in matrices),
            "galore_refreshes": float(sum(matrix.num_refreshes for matrix in matrices)),
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def _of_matrix(matrix: LowRankMatrix, gradient: Tensor) -> dict[str, Tensor]:
    """Numbers of one matrix; those of the last refresh once there was one after the first."""
    dense = (gradient.to_dense() if gradient.is_sparse else gradient).flatten(1)
    bases = matrix.current()
    assert bases is not None
    known = {
        "captured": bases.captured(dense),
        "captured_best": matrix.projection.best(dense),
        "captured_random": torch.tensor(matrix.projection.chance(matrix.shape)),
        "overlap_random": torch.tensor(matrix.projection.overlap_by_chance(matrix.shape)),
    }
    return {f"galore_{name}": value for name, value in (known | matrix.numbers).items()}
