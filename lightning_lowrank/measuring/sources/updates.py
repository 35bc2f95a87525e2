"""Updates: what one optimizer step changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lightning_lowrank.measuring.parameter_source import ParameterSource, attempt, change
from lightning_lowrank.measuring.source import Batch, Reading, Step
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
        # Of each parameter how often it had been written to when the batch began.
        self._versions: dict[int, int] = {}

    def batch_begins(self, batch: Batch) -> None:
        """Note how often weights have been written to."""
        if not self._versions:
            self._versions = {id(p): p._version for site in self.sites for p in site.parameters}

    def gradients_final(self, step: Step) -> list[Reading]:
        """Keep the weights; nothing to read yet."""
        moving = [site for site in self.sites if step.owns(site) and self.reads(site)]
        gone = [site for site in moving if self._has_moved(site)]
        self._before = [(site, attempt(partial(_copied, site))) for site in moving if site not in gone]
        if gone:
            raise ValueError(
                f"{gone[0].name!r} was changed before its optimizer stepped, as by an optimizer inside the backward "
                "pass: that update is not known"
            )
        return []

    def step_done(self, step: Step) -> list[Reading]:
        """The change."""
        before, self._before = self._before, []
        for parameter in step.parameters:
            self._versions.pop(parameter, None)
        return [change(site, values) for site, values in before]

    def _has_moved(self, site: Site) -> bool:
        """Whether a weight without a gradient has been written to since the batch began."""
        return any(p.grad is None and p._version != self._versions.get(id(p), p._version) for p in site.parameters)

    def reads(self, site: Site) -> bool:
        """Where something is trained."""
        return any(p.requires_grad for p in site.parameters)

    def detach(self) -> None:
        """Forget the weights that were kept."""
        self._before, self._versions = [], {}


def _copied(site: Site) -> list[Tensor]:
    return [value.clone() for value in site.values()]
