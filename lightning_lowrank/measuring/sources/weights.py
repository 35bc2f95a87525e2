"""Weights."""

from dataclasses import dataclass

from lightning_lowrank.measuring.parameter_source import ParameterSource, weights
from lightning_lowrank.measuring.source import Reading, Step


@dataclass(kw_only=True)
class Weights(ParameterSource):
    """Weights before the step, frozen ones included; a LoRA pair as its product, a parametrised weight as used."""

    name = "weight"

    def gradients_final(self, step: Step) -> list[Reading]:
        """The weights."""
        return [weights(site) for site in self.sites if step.owns(site)]
