"""What every source of matrices has: sites to read, and the moments of a training step at which it reads them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lowrank.sites import Site, sites
from lightning_lowrank.spectrum import Spectrum
from lightning_lowrank.views import View


@dataclass(frozen=True)
class Reading:
    """One value of a source: the matrices of a site, or a spectrum where only that is known.

    Attributes:
        labels: One tag ending per matrix.
        value: Matrices `[*B, M, N]`, valid until the caller returns; or their spectrum.
        site: Where the weights are, None where there are none.
        weight: Those to set beside it where they are no longer at the site: the weights before the step.
    """

    labels: tuple[str, ...]
    value: Tensor | Spectrum
    site: Site | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One step of one optimizer, as sources see it.

    Attributes:
        optimizer: The one that steps.
        parameters: Ids of the parameters to read now: its own, and with the first optimizer of a sample also those that none owns.
        scale: What gradients are still multiplied by (fused optimizers under a GradScaler), None for 1.
    """

    optimizer: Optimizer
    parameters: frozenset[int]
    scale: Tensor | None = None

    def owns(self, site: Site) -> bool:
        """Whether this step is the one to read the site in."""
        return id(site.parameters[0]) in self.parameters


class Source(ABC):
    """Where matrices come from. Each moment is called on due steps only; a source answers at the moments that it reads at.

    Attributes:
        name: First part of the tags.
        of_parameters: Its sites are parameters.
        of_changes: What it reads are changes of the weights, so that the weights can be set beside them.
        stage: The loop whose batches it watches.
    """

    name: str
    of_parameters: bool = True
    of_changes: bool = False
    stage: Literal["train", "validation"] = "train"

    @abstractmethod
    def plan(self, module: nn.Module) -> None:
        """Choose the sites.

        Raises:
            ValueError: A pattern matches nothing; the message lists what there is.
        """

    @abstractmethod
    def labels(self) -> Sequence[str]:
        """One name per matrix that it can give."""

    def batch_begins(self, module: nn.Module) -> None:
        """A batch of a due step is about to enter the module."""

    def gradients_final(self, step: Step) -> list[Reading]:
        """Gradients are synchronised, unscaled and accumulated, not yet clipped; weights are those before the step."""
        return []

    def step_done(self, step: Step) -> list[Reading]:
        """The optimizer has stepped."""
        return []

    def batch_over(self) -> None:
        """The batch is over; nothing may be left in the module."""

    def sample_over(self) -> list[Reading]:
        """All batches of the due step are over. Called on every process at the same step, so it may communicate."""
        return []

    def facts(self) -> dict[str, float]:
        """Numbers to log beside what was read, known on the host."""
        return {}

    def detach(self) -> None:
        """Let go of everything that is held or hooked, whatever the state."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart: plain tensors and numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""


@dataclass(kw_only=True)
class ParameterSource(Source):
    """A source whose sites are parameters of the module.

    Args:
        match: Parameters to read: globs on the full name, `re:REGEX`, `type:LAYERCLASS`, one or several; all matrices unless given.
        exclude: The same, taken away.
        min_size: Shortest side of a matrix to read.
        heads: Split attention weights by head.
        views: Your own einops patterns by parameter name (glob); the right side ends in `rows columns`.
    """

    match: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    min_size: int = 2
    heads: bool = False
    views: Mapping[str, str | View] | None = None

    def __post_init__(self) -> None:
        self.sites: list[Site] = []
        self._seen: tuple[tuple[str, int], ...] = ()

    def plan(self, module: nn.Module) -> None:
        """Choose the sites, anew only when parameters came or went."""
        # With names: a parametrization keeps the parameter and changes where it is.
        seen = tuple((name, id(parameter)) for name, parameter in module.named_parameters())
        if seen != self._seen:
            chosen = {"match": self.match, "exclude": self.exclude, "min_size": self.min_size, "heads": self.heads, "views": self.views}
            self.sites = sites(module, **chosen)  # type: ignore[arg-type]
            self._seen = seen

    def labels(self) -> list[str]:
        """One name per matrix, in the order of the module's parameters."""
        return [label for site in self.sites if self.reads(site) for label in site.labels]

    def each(self, sites: Iterable[Site], read: Callable[[Site], Tensor]) -> list[tuple[Site, Tensor]]:
        """What is read of each site. One that cannot be read has no number, which is counted, and does no harm to the others."""
        found: list[tuple[Site, Tensor]] = []
        for site in sites:
            with suppress(Exception):
                found.append((site, read(site)))
        return found

    def reads(self, site: Site) -> bool:
        """Whether it has something to read there, as things are now."""
        return True


def difference(now: Tensor, before: Tensor) -> Tensor:
    """What changed, in float32 at least: in half precision the difference would be rounded once more."""
    return now.to(torch.promote_types(now.dtype, torch.float32)) - before
