"""Weights."""

from dataclasses import dataclass

from lightning_lowrank.sources.source import ParameterSource, Reading, Step


@dataclass(kw_only=True)
class Weights(ParameterSource):
    """Weights before the step, frozen ones too; a LoRA pair as its product, a parametrised weight as the layer uses it."""

    name = "weight"

    def gradients_final(self, step: Step) -> list[Reading]:
        """The weights."""
        read = self.each(filter(step.owns, self.sites), lambda site: site.weight())
        return [Reading(site.labels, value, site) for site, value in read]
