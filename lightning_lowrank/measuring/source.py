"""What every source of matrices has: sites to read, and the moments of a training step at which it reads them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.models.sites import Site, sites
from lightning_lowrank.models.views import View


@dataclass(frozen=True)
class Reading:
    """What a source has to offer for one place: made into matrices, or their spectrum, only by the process that
    measures it.

    Every process has the same readings in the same order; their parts differ where tensors are sharded or summands.

    Attributes:
        labels: One tag ending per matrix.
        shape: Of the matrices, `[*B, M, N]`.
        parts: What it is made from, valid until the caller returns; empty where there is nothing to read.
        make: Takes the parts, each whole.
        like: Tensors of the shapes and placements of the parts, for a process that could not read its own.
        dtype: Of the parts, where it is not that of `like`.
        weight: The weights to set beside it.
    """

    labels: tuple[str, ...]
    shape: torch.Size
    parts: Sequence[Tensor]
    make: Callable[..., Tensor | Spectrum]
    like: Sequence[Tensor] = ()
    dtype: torch.dtype | None = None
    weight: "Reading | None" = None


@dataclass(frozen=True)
class Step:
    """One step of one optimizer, as sources see it.

    Attributes:
        optimizer: The one that steps.
        parameters: Ids of the parameters to read now: its own, and with the first optimizer of a sample also those that
            none owns.
        scale: What gradients are still multiplied by (fused optimizers under a GradScaler), None for 1.
    """

    optimizer: Optimizer
    parameters: frozenset[int]
    scale: Tensor | None = None

    def owns(self, site: Site) -> bool:
        """Whether this step is the one to read the site in."""
        return id(site.parameters[0]) in self.parameters


@dataclass(frozen=True)
class Batch:
    """A batch that is about to enter the module.

    Attributes:
        module: The one in training.
        batch: What the loader gave.
        index: Its number in the epoch.
        optimizers: The Trainer's.
        team: The processes that share the work.
        seed: Of what is drawn in this sample; the same on every process.
    """

    module: nn.Module
    batch: Any
    index: int
    optimizers: Sequence[Optimizer]
    team: Team
    seed: int


class Source(ABC):
    """Where matrices come from. Each moment is called on due steps only; a source answers at the moments that it reads
    at.

    Attributes:
        name: First part of the tags.
        of_parameters: Its sites are parameters.
        of_changes: What it reads are changes of the weights, so that the weights can be set beside them.
        stage: The loop whose batches it watches.
        level: Where what it reads belongs, in overviews.
        timed: Counts the time of what happens inside the user's own code.
    """

    name: str
    of_parameters: bool = True
    of_changes: bool = False
    stage: Literal["train", "validation"] = "train"
    level: Literal["parameters", "functions", "structure", "subnetworks"] = "parameters"
    timed: Callable[[], AbstractContextManager[None]] = nullcontext

    @abstractmethod
    def plan(self, module: nn.Module) -> None:
        """Choose the sites.

        Raises:
            ValueError: A pattern matches nothing; the message lists what there is.
        """

    @abstractmethod
    def labels(self) -> Sequence[str]:
        """One name per matrix that it is to give now."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Rows and columns of every matrix that it may ever give, by label; the same on every process."""

    def units(self) -> Mapping[str, torch.Size]:
        """What can be shared out between processes before it is read: shapes of the readings to come, by their first
        label.
        """
        return {}

    def batch_begins(self, begun: Batch) -> None:
        """A batch of a due step is about to enter the module."""

    def loss_live(self, loss: Tensor, scale: Tensor | float) -> None:
        """The loss is computed and its graph is there; the backward pass is next.

        Args:
            loss: The step's own.
            scale: What it has been multiplied by, for accumulation and half precision.
        """

    def gradients_final(self, step: Step) -> list[Reading]:
        """Gradients are synchronised, unscaled and accumulated, not yet clipped; weights are those before the step."""
        return []

    def step_done(self, step: Step) -> list[Reading]:
        """The optimizer has stepped."""
        return []

    def batch_over(self) -> None:
        """The batch is over; nothing may be left in the module."""

    def sample_over(self, team: Team) -> list[Reading]:
        """All batches of the due step are over. Called on every process at the same step, so it may communicate."""
        return []

    def facts(self) -> dict[str, float]:
        """Numbers to log beside what was read, known on the host."""
        return {}

    def note(self) -> str:
        """What a user should know of how it reads, to be said once; nothing unless there is something."""
        return ""

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
        match: Parameters to read: globs on the full name, `re:REGEX`, `type:LAYERCLASS`, one or several; all matrices
            unless given.
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
        self._seen: tuple[tuple[str, int, bool], ...] = ()

    def plan(self, module: nn.Module) -> None:
        """Choose the sites, anew only when parameters came or went."""
        # With names: a parametrization keeps the parameter and changes where it is, as a lazy module keeps it and gives
        # it a shape.
        seen = tuple((name, id(parameter), is_lazy(parameter)) for name, parameter in module.named_parameters())
        if seen != self._seen:
            chosen = {
                "match": self.match,
                "exclude": self.exclude,
                "min_size": self.min_size,
                "heads": self.heads,
                "views": self.views,
            }
            self.sites = sites(module, **chosen)  # type: ignore[arg-type]
            self._seen = seen

    def labels(self) -> list[str]:
        """One name per matrix, in the order of the module's parameters."""
        return [label for site in self.sites if self.reads(site) for label in site.labels]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Those of all sites, frozen ones too."""
        return {label: (site.shape[-2], site.shape[-1]) for site in self.sites for label in site.labels}

    def units(self) -> dict[str, torch.Size]:
        """Those of the sites that it reads."""
        return {site.labels[0]: site.shape for site in self.sites if self.reads(site)}

    def reads(self, site: Site) -> bool:
        """Whether it has something to read there, as things are now."""
        return True


def weights(site: Site, values: Sequence[Tensor] | None = None) -> Reading:
    """The matrices of a site, at values of its parameters; at those of now unless given."""
    return Reading(site.labels, site.shape, site.values() if values is None else values, site.weight, site.parameters)


def change(site: Site, before: Sequence[Tensor]) -> Reading:
    """What a site's matrices are now less what they were; nothing to read where it is not known what they were."""
    count = len(site.parameters) if before else 0

    def made(*parts: Tensor) -> Tensor:
        return difference(site.weight(*parts[:count]), site.weight(*parts[count:]))

    if site.linear:  # each process subtracts what it has
        parts = attempt(lambda: [difference(*pair) for pair in zip(site.values(), before, strict=bool(before))])
        dtype = torch.promote_types(site.parameters[0].dtype, torch.float32)
        return Reading(site.labels, site.shape, parts, site.view, site.parameters, dtype, weights(site, before))
    parts = [*site.values(), *before] if before else ()
    return Reading(site.labels, site.shape, parts, made, site.parameters * 2, weight=weights(site, before))


def attempt(read: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What was read; nothing where that is not possible, which is counted and does no harm to other sites."""
    try:
        return read()
    except Exception:
        return ()


def difference(now: Tensor, before: Tensor) -> Tensor:
    """What changed, in float32 at least: in half precision the difference would be rounded once more."""
    if now.shape != before.shape:  # a single row would be subtracted from each
        raise ValueError(f"a tensor of shape {tuple(before.shape)} has become one of {tuple(now.shape)}")
    return now.to(torch.promote_types(now.dtype, torch.float32)) - before
