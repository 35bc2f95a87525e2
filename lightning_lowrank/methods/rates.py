"""Learning rates of single parameters: for the time of one step, groups of an optimizer are split."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepRates:
    """Multiplies the learning rates of single parameters, within steps alone.

    Between steps the groups are those of the user: schedulers, checkpoints and whoever reads a rate see nothing.

    Args:
        factor: Of a parameter; asked at each step.
    """

    def __init__(self, factor: Callable[[Tensor], float]) -> None:
        self._factor = factor
        self._hooks: list[RemovableHandle] = []
        self._split: dict[Optimizer, list[dict[str, Any]]] = {}

    def begin(self, optimizers: Sequence[Optimizer]) -> None:
        """From now on."""
        self.end()
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before))
            self._hooks.append(optimizer.register_step_post_hook(self._after))

    def end(self) -> None:
        """Take the hooks away, and put back the groups of a step that was broken off."""
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
