"""Updates: what one optimizer step changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lightning_lowrank.measuring.parameter_source import ParameterSource, attempt, change
from lightning_lowrank.measuring.source import Reading, Step
from lightning_lowrank.models.sites import Site


@dataclass(kw_only=True)
class Updates(ParameterSource):
    """Weights after the step less those before it: learning rate, momentum, clipping and decay included.

    Keeps a copy of the weights it watches from before each due step until after it.
    """

    name = "update"
    of_changes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._before: list[tuple[Site, Sequence[Tensor]]] = []

    def gradients_final(self, step: Step) -> list[Reading]:
        """Keep the weights; nothing to read yet."""
        moving = [site for site in self.sites if step.owns(site) and self.reads(site)]
        self._before = [(site, attempt(partial(_copied, site))) for site in moving]
        return []

    def step_done(self, step: Step) -> list[Reading]:
        """The change."""
        before, self._before = self._before, []
        return [change(site, values) for site, values in before]

    def reads(self, site: Site) -> bool:
        """Where something is trained."""
        return any(p.requires_grad for p in site.parameters)

    def detach(self) -> None:
        """Forget the weights that were kept."""
        self._before = []


def _copied(site: Site) -> list[Tensor]:
    return [value.clone() for value in site.values()]
