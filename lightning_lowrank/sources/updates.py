"""Updates: what one optimizer step changes."""

from dataclasses import dataclass

from torch import Tensor

from lightning_lowrank.sites import Site
from lightning_lowrank.sources.source import ParameterSource, Reading, Step, difference


@dataclass(kw_only=True)
class Updates(ParameterSource):
    """Weights after the step less those before it: learning rate, momentum, clipping and decay included.

    Keeps a copy of the weights it watches from before each due step until after it.
    """

    name = "update"
    of_changes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._before: list[tuple[Site, Tensor]] = []

    def gradients_final(self, step: Step) -> list[Reading]:
        """Keep the weights; nothing to read yet."""
        moving = [site for site in self.sites if step.owns(site) and self.reads(site)]
        self._before = self.each(moving, lambda site: site.weight().clone())
        return []

    def step_done(self, step: Step) -> list[Reading]:
        """The change."""
        before, self._before = dict(self._before), []
        changes = self.each(before, lambda site: difference(site.weight(), before[site]))
        return [Reading(site.labels, change, site, before[site]) for site, change in changes]

    def reads(self, site: Site) -> bool:
        """Where something is trained."""
        return any(p.requires_grad for p in site.parameters)

    def detach(self) -> None:
        """Forget the weights that were kept."""
        self._before = []
