"""Weights."""

from dataclasses import dataclass

from lightning_lowrank.sources.source import ParameterSource, Reading, Step


@dataclass(kw_only=True)
class Weights(ParameterSource):
    """Weights before the step, frozen ones too; a LoRA pair as its product, a parametrised weight as the layer uses it."""

    name = "weight"

    def gradients_final(self, step: Step) -> list[Reading]:
        """The weights."""
        return [Reading(site.labels, site.weight(), site) for site in self.sites if step.owns(site)]
