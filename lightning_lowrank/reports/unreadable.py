"""A run of which nothing can be read any more, as its weights are no numbers: said once, whoever sees it first."""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lowrank.distributed.shards import local
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.loggers import to_host

# Step from which on there is no number, by module: all monitors of a training know of it.
_SINCE: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def since(training: Training, step: int) -> tuple[int, str] | None:
    """From which step on there is no number, and the sentence where nobody has said it; None where weights are numbers.

    To be asked where numbers are missing: it looks at all weights and waits for the device.

    Args:
        step: Of the report in which they are.
    """
    what = _not_finite(training.module)
    if not what:
        return None
    first = _SINCE.get(training.module)
    _SINCE.setdefault(training.module, step)
    return (step, f"no number since step {step} (weights are {what})") if first is None else (first, "")


def forget(training: Training) -> None:
    """Another run of the same module."""
    _SINCE.pop(training.module, None)


@torch.no_grad()
def _not_finite(module: nn.Module) -> str:
    sums = {str(i): weights.sum(dtype=working_dtype(weights.device)) for i, weights in enumerate(_weights(module))}
    values = np.array(list(to_host(sums).values())) if sums else np.zeros(1)
    return "" if np.isfinite(values).all() else "NaN" if np.isnan(values).any() else "infinite"


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """What this process has of them, where they are floating-point numbers."""
    for parameter in module.parameters():
        weights = None if is_lazy(parameter) else local(parameter.detach())
        if weights is not None and weights.is_floating_point() and weights.itemsize > 1 and weights.numel():
            yield weights
