"""`LossMonitor`: the loss and the norm of the gradient, for the rules that watch them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lowrank.distributed.shards import is_sharded
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Detail, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.source import Step
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of


class StepLoss(NumberSource):
    """The loss of a due step and the norm of its gradient, before clipping.

    Raises:
        ValueError: In `plan`: a parameter is sharded.
    """

    name = "step"
    level = "functions"
    quantities = (Quantity("step_loss", detail="core"), Quantity("step_gradient_norm", detail="core"))

    def __init__(self) -> None:
        self._parameters: dict[int, nn.Parameter] = {}
        self._losses: list[Tensor] = []
        self._energies: list[Tensor] = []

    def plan(self, training: Training) -> None:
        """Choose all trained parameters."""
        named = dict(training.module.named_parameters())
        sharded = next((name for name, parameter in named.items() if is_sharded(parameter)), None)
        if sharded is not None:
            raise ValueError(f"LossMonitor: {sharded!r} is sharded, but gradients must be read whole; use DDP")
        self._parameters = {id(p): p for p in named.values() if not is_lazy(p)}

    def loss_live(self, loss: Tensor, scale: Tensor | float) -> None:
        """Keep the loss of a micro-batch."""
        self._losses.append(loss.detach().to(working_dtype(loss.device)).mean() / scale)

    def gradients_final(self, step: Step) -> list[Any]:
        """Add up the squares of the gradients of an optimizer's parameters."""
        with torch.no_grad():
            scale = 1.0 if step.scale is None else step.scale
            gradients = [p.grad for name, p in self._parameters.items() if name in step.parameters]
            self._energies += [_energy(gradient) / scale**2 for gradient in gradients if gradient is not None]
        return []

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Means over processes of losses and of squares; squares are equal on all if gradients are summed."""
        device = next((p.device for p in self._parameters.values()), torch.device("cpu"))
        unknown = torch.full((), torch.nan, dtype=working_dtype(device), device=device)
        loss = torch.stack([loss.to(unknown) for loss in self._losses]).mean() if self._losses else unknown
        energy = torch.stack([part.to(unknown) for part in self._energies]).sum() if self._energies else unknown
        loss, energy = team.all_reduce(torch.stack([loss, energy])) / team.size
        self.detach()
        return [Numbers(WHOLE_MODEL, {"step_loss": loss, "step_gradient_norm": energy.sqrt()})]

    def detach(self) -> None:
        """Drop the unfinished sample."""
        self._losses, self._energies = [], []

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_parameters": {}, "_losses": [], "_energies": []}


def _energy(gradient: Tensor) -> Tensor:
    """Sum of squares."""
    dense = gradient.coalesce().values() if gradient.is_sparse else gradient
    dtype = working_dtype(dense.device)
    norm: Tensor = torch.linalg.vector_norm(dense, dtype=None if dense.is_complex() else dtype)
    return norm.to(dtype).square()


class LossMonitor(Monitor):
    """The loss of each step and the norm of its gradient before clipping, with rules on their jumps and drifts.

    Writes `step/loss`, the mean over the backward passes of a step and over processes, and `step/gradient_norm`, of all
    parameters together. They are the baseline for every other early warning, and they detect faults of labels and of
    the schedule first (docs/evidence/warnings.md).

    Cost: one pass over the gradients per sample, in addition to the fixed cost of any monitor's sample.

    Args:
        every_n_steps: Cadence in optimizer steps; default 1, because the rules look for single steps.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Has no effect, because there are no sites.
        name: Prefix of all tags.
        alerts: Alert rules; by default those with early warnings and few false alarms (docs/evidence/warnings.md).
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of range; when training starts: parameters are sharded.

    Examples:
        >>> LossMonitor().recorders[0].quantities
        ['step_loss', 'step_gradient_norm']
    """

    word = "step"

    def __init__(
        self,
        every_n_steps: int | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = "default",
        max_overhead: float | None = None,
    ) -> None:
        probes = probe_of(StepLoss(), cadence(every_n_steps, max_overhead, 1))
        super().__init__(probes, detail=detail, per_site=per_site, alerts=alerts, name=name)
