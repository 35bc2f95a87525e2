"""The point to which rounds rewind: weights and buffers, settings of optimizers, states of schedulers."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lowrank.models.names import tags
from lightning_lowrank.models.training import Training


@torch.no_grad()
def taken(training: Training) -> dict[str, Any]:
    """A copy of everything from which a round starts: plain tensors and numbers."""
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in _tensors(training.module).items()},
        "groups": [[_plain(group) for group in optimizer.param_groups] for optimizer in training.optimizers],
        "schedulers": [deepcopy(scheduler.state_dict()) for scheduler in training.schedulers],
    }


@torch.no_grad()
def rewind(training: Training, point: Mapping[str, Any]) -> None:
    """Restore everything; optimizers begin without state."""
    for name, tensor in _tensors(training.module).items():
        start = point["tensors"].get(name)
        if start is not None and start.shape == tensor.shape:  # buffers that hold caches may have grown
            tensor.copy_(start)
    # The groups first: a scheduler may look at them.
    for optimizer, groups in zip(training.optimizers, point["groups"], strict=False):
        _restart(optimizer, groups)
    for scheduler, state in zip(training.schedulers, point["schedulers"], strict=False):
        scheduler.load_state_dict(deepcopy(state))


def num_bytes(module: nn.Module) -> int:
    """Bytes of a copy of the weights and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(module).values())


def _restart(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    optimizer.state.clear()
    for group, start in zip(optimizer.param_groups, groups, strict=False):
        for key, value in start.items():
            if isinstance(value, Tensor) and isinstance(group[key], Tensor):
                group[key].copy_(value)  # a captured graph reads it where it is
            else:
                group[key] = deepcopy(value)


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a group: numbers, and pairs of them, words, tensors."""
    known = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)
        for key, value in known.items()
        if value is None or isinstance(value, bool | int | float | str | tuple | list | Tensor)
    }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    labels = tags(named)
    return {labels[name]: tensor for name, tensor in named.items() if not is_lazy(tensor)}
