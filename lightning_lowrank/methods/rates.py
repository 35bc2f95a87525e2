"""Learning rates of single parameters: groups of an optimizer are split during a step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepRates:
    """Multiplies the learning rates of single parameters, during steps only.

    Between steps, the groups are the user's, so schedulers, checkpoints and loggers of rates see no difference.

    Args:
        factor: Factor for a parameter; asked at each step.
    """

    def __init__(self, factor: Callable[[Tensor], float]) -> None:
        self._factor = factor
        self._hooks: list[RemovableHandle] = []
        self._split: dict[Optimizer, list[dict[str, Any]]] = {}

    def begin(self, optimizers: Sequence[Optimizer]) -> None:
        """Start to act."""
        self.end()
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before))
            self._hooks.append(optimizer.register_step_post_hook(self._after))

    def end(self) -> None:
        """Remove the hooks, and restore the groups of an interrupted step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for optimizer in list(self._split):
            self._after(optimizer)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._after(optimizer)
        self._split[optimizer] = groups = optimizer.param_groups
        optimizer.param_groups = [part for group in groups for part in self._parts(group)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        groups = self._split.pop(optimizer, None)
        if groups is not None:
            optimizer.param_groups = groups

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """A group as one for each factor; itself where all is as it was."""
        by_factor: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(self._factor(parameter), []).append(parameter)
        if set(by_factor) <= {1.0}:
            return [group]
        return [group | {"params": some, "lr": group["lr"] * factor} for factor, some in by_factor.items()]
