"""Optimizer state."""

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from lightning_lowrank.measuring.parameter_source import ParameterSource
from lightning_lowrank.measuring.source import Reading, Step

ALIASES = {"first_moment": ("exp_avg", "momentum_buffer"), "second_moment": ("exp_avg_sq",)}


@dataclass
class OptimizerState(ParameterSource):
    """State of the optimizer for each parameter, after the step.

    Args:
        key: An entry of the optimizer's state with the shape of the parameter (`exp_avg`, `momentum_buffer`,
            `square_avg`, ...), or `first_moment` (Adam's `exp_avg`, SGD's `momentum_buffer`) or `second_moment`
            (`exp_avg_sq`). It is the first part of the tags.

    A parameter without that entry is not read. LoRA pairs have no state of their product and are not read.
    """

    key: str = "first_moment"
    _: KW_ONLY

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.key

    def labels(self) -> list[str]:
        """None before the first step of the optimizer, since its state is unknown until then."""
        return []

    def step_done(self, step: Step) -> list[Reading]:
        """The state."""
        return [
            Reading(site.labels, site.shape, state, site.view, site.parameters)
            for site in self.sites
            if step.owns(site) and (state := self._state(step, site.parameters))
        ]

    def _state(self, step: Step, parameters: tuple[Tensor, ...]) -> list[Tensor]:
        """The entry, none where there is none."""
        kept = step.optimizer.state.get(parameters[0], {}) if len(parameters) == 1 else {}
        entries = (kept.get(key) for key in ALIASES.get(self.key, (self.key,)))
        return [e for e in entries if isinstance(e, Tensor) and e.shape == parameters[0].shape][:1]
