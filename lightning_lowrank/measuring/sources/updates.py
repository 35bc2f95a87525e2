"""Updates: what one optimizer step changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lowrank.distributed.shards import is_sharded
from lightning_lowrank.measuring.parameter_source import HALF, ParameterSource, attempt, change
from lightning_lowrank.measuring.source import Batch, Reading, Step
from lightning_lowrank.models.sites import Site

# Names under which optimizers keep a float32 copy of a parameter in half precision.
MASTERS = ("master_param", "master_weight", "master", "fp32_param", "fp32_master")


@dataclass(kw_only=True)
class Updates(ParameterSource):
    """Weights after the step minus those before it: learning rate, momentum, clipping and decay included.

    It keeps a copy of the watched weights from before each due step until after it. For weights in half precision, it
    reads the optimizer's own copy in float32, if its state has one (`master_param` and the like). Otherwise it reads
    the stored weights. Effective ranks are then NaN if more than 0.02 of the entries do not change, since rounding
    fills the small singular values. Rows and columns that do not change at all are left out.
    """

    name = "update"
    of_changes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._before: list[tuple[Site, Sequence[Tensor]]] = []
        # Of each parameter how often it had been written to when the batch began.
        self._versions: dict[int, int] = {}

    def batch_begins(self, batch: Batch) -> None:
        """Note how often weights have been written to."""
        if not self._versions:
            self._versions = {id(p): p._version for site in self.sites for p in site.parameters}

    def gradients_final(self, step: Step) -> list[Reading]:
        """Keep the weights; nothing to read yet."""
        moving = [site for site in self.sites if step.owns(site) and self.reads(site)]
        gone = [site for site in moving if self._has_moved(site)]
        self._before = [(site, attempt(partial(_copied, site, step))) for site in moving if site not in gone]
        if gone:
            raise ValueError(
                f"{gone[0].name!r} changed before its optimizer stepped, for example by an optimizer inside the "
                "backward pass, so its update is unknown"
            )
        return []

    def step_done(self, step: Step) -> list[Reading]:
        """The change of the weights."""
        before, self._before = self._before, []
        for parameter in step.parameters:
            self._versions.pop(parameter, None)
        return [change(site, values, _now(site, values, step)) for site, values in before]

    def _has_moved(self, site: Site) -> bool:
        """Whether a weight without a gradient has been written to since the batch began."""
        return any(p.grad is None and p._version != self._versions.get(id(p), p._version) for p in site.parameters)

    def reads(self, site: Site) -> bool:
        """Whether something is trained."""
        return any(p.requires_grad for p in site.parameters)

    def detach(self) -> None:
        """Drop the copy of the weights."""
        self._before, self._versions = [], {}


def _copied(site: Site, step: Step) -> list[Tensor]:
    return [value.clone() for value in _masters(site, step) or site.values()]


def _now(site: Site, before: Sequence[Tensor], step: Step) -> Sequence[Tensor] | None:
    """The optimizer's own copies, where those before the step were; else None."""
    masters = _masters(site, step)
    are_own = [value.dtype for value in before] == [value.dtype for value in masters]
    return masters if masters and are_own else None


def _masters(site: Site, step: Step) -> list[Tensor]:
    """Copies in float32 that the optimizer steps in the place of parameters in half precision; empty without."""
    state = step.optimizer.state
    kept = [master_of(parameter, state.get(parameter, {})) for parameter in site.parameters]
    found = [master for master in kept if master is not None]
    return found if len(found) == len(kept) and any(p.dtype in HALF for p in site.parameters) else []


def master_of(parameter: Tensor, state: Mapping[str, Any]) -> Tensor | None:
    """What an optimizer steps: the parameter, or of one in half precision its copy in float32, None without.

    Args:
        parameter: It.
        state: What the optimizer keeps of it.
    """
    if parameter.dtype not in HALF:
        return parameter.detach()
    kept = [state.get(name) for name in MASTERS]
    found = [value for value in kept if isinstance(value, Tensor) and value.dtype == torch.float32]
    fits = (value.detach() for value in found if value.shape == parameter.shape)
    return next((value for value in fits if is_sharded(value) == is_sharded(parameter)), None)
