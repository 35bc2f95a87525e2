"""Displacement: how far the weights are from where they began."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_lowrank.sites import Site
from lightning_lowrank.sources.source import ParameterSource, Reading, Step, difference


@dataclass(kw_only=True)
class Displacement(ParameterSource):
    """Weights less those at the start of the fit, or of the run that is resumed: W_t - W_0.

    Keeps W_0 of the matched sites in its dtype, on its device and in the checkpoint: as many bytes as the weights,
    logged as `lowrank/displacement_bytes` and said at the start.
    """

    name = "displacement"
    of_changes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._initial: dict[str, Tensor] = {}

    def plan(self, module: nn.Module) -> None:
        """Choose the sites and keep the weights of new ones."""
        super().plan(module)
        new = [site for site in self.sites if site.name not in self._initial]
        self._initial |= {site.name: weight.clone() for site, weight in self.each(new, lambda site: site.weight())}

    def gradients_final(self, step: Step) -> list[Reading]:
        """The distance, before the step."""
        return [Reading(site.labels, value, site) for site, value in self.each(filter(step.owns, self.sites), self._moved)]

    def facts(self) -> dict[str, float]:
        """Memory that the copy takes."""
        return {"bytes": float(sum(t.numel() * t.element_size() for t in self._initial.values()))}

    def state_dict(self) -> dict[str, Any]:
        """W_0."""
        return dict(self._initial)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """W_0 of the run that is resumed."""
        self._initial = dict(state)

    def _moved(self, site: Site) -> Tensor:
        now = site.weight()
        start = self._initial[site.name].to(now.device)
        # A layer that was replaced by one of another size begins anew.
        self._initial[site.name] = start if start.shape == now.shape else now.clone()
        return difference(now, self._initial[site.name])
