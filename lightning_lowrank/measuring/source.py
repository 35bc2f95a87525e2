"""What every source has, the moments of a step at which it reads; and what sources of matrices have besides."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.models.sites import Site
from lightning_lowrank.models.training import Training


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
        rounded: What it is made from are differences of numbers in half precision.
    """

    labels: tuple[str, ...]
    shape: torch.Size
    parts: Sequence[Tensor]
    make: Callable[..., Tensor | Spectrum]
    like: Sequence[Tensor] = ()
    dtype: torch.dtype | None = None
    weight: "Reading | None" = None
    rounded: bool = False


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
        training: The training that it belongs to.
        data: What the loader gave.
        index: Its number in the epoch.
        seed: Of what is drawn in this sample; the same on every process.
    """

    training: Training
    data: Any
    index: int
    seed: int


class Source(ABC):
    """Where numbers come from: the moments at which they are read, `MatrixSource` or `NumberSource` what they are.

    Moments come on due steps only, so a running average over all steps cannot be a source. The order within a step:
    `batch_begins`, `loss_live`, `backward_done` and `batch_over` for every micro-batch, `gradients_final` and
    `step_done` for every optimizer, `sample_over` or `numbers` once.

    Attributes:
        name: First part of the tags.
        of_parameters: Its sites are parameters, so that an optimizer that does not step in the due batch is waited for.
        stage: The loop whose batches it watches.
        level: Where what it reads belongs, in overviews.
        timed: Counts the time of what happens inside the user's own code.
    """

    name: str
    of_parameters: bool = True
    stage: Literal["train", "validation"] = "train"
    level: Literal["parameters", "functions", "structure", "subnetworks"] = "parameters"
    timed: Callable[[], AbstractContextManager[None]] = nullcontext

    @abstractmethod
    def plan(self, training: Training) -> None:
        """Choose the sites.

        Raises:
            ValueError: A pattern matches nothing; the message lists what there is.
        """

    @abstractmethod
    def labels(self) -> Sequence[str]:
        """Sites that are to have a number now."""

    def batch_begins(self, batch: Batch) -> None:
        """A batch of a due step is about to enter the module."""

    def loss_live(self, loss: Tensor, scale: Tensor | float) -> None:
        """The loss is computed and its graph is there; the backward pass is next.

        Args:
            loss: The step's own.
            scale: What it has been multiplied by, for accumulation and half precision.
        """

    def backward_done(self) -> None:
        """The gradient of one micro-batch has been added; of the first one, it stands alone."""

    def gradients_final(self, step: Step) -> list[Reading]:
        """Gradients are synchronised, unscaled and accumulated, not yet clipped; weights are those before the step."""
        return []

    def step_done(self, step: Step) -> list[Reading]:
        """The optimizer has stepped."""
        return []

    def batch_over(self) -> None:
        """The batch is over; nothing may be left in the module."""

    def facts(self) -> dict[str, float]:
        """Numbers to log beside what was read, known on the host."""
        return {}

    def note(self) -> str:
        """One sentence for the log about how this source reads; printed once per wording. Empty: nothing to print."""
        return ""

    def detach(self) -> None:
        """Let go of everything that is held or hooked, whatever the state."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart: plain tensors and numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""


class MatrixSource(Source):
    """A source of matrices, whose spectra are asked for statistics.

    Attributes:
        of_changes: What it reads are changes of the weights, so that the weights can be set beside them.
    """

    of_changes: bool = False

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Rows and columns of every matrix that it may ever give, by label; the same on every process."""

    def units(self) -> Mapping[str, torch.Size]:
        """What can be shared out between processes before it is read: shapes of the readings to come, by their first
        label.
        """
        return {}

    def sample_over(self, team: Team) -> list[Reading]:
        """All batches of the due step are over. Called on every process at the same step, so it may communicate."""
        return []
