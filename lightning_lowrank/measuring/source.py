"""The base of every source: the moments of a step at which it reads; and additions for sources of matrices."""

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
    """What a source reads at one place. Only the process that measures it computes the matrices or their spectrum.

    Every process has the same readings in the same order. Their parts differ if tensors are sharded or partial sums.

    Attributes:
        labels: One tag ending per matrix.
        shape: Shape of the matrices, `[*B, M, N]`.
        parts: The tensors it is made of, valid until the caller returns; empty if there is nothing to read.
        make: Computes the matrices from the parts, each of them whole.
        like: Tensors with the shapes and placements of the parts, for a process that could not read its own.
        dtype: Dtype of the parts, if it differs from that of `like`.
        weight: The weights to compare with.
        rounded: Whether it is made of differences of numbers in half precision.
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
    """Where numbers come from: the moments at which they are read. `MatrixSource` and `NumberSource` define what is
    read.

    Moments occur on due steps only, so a running average over all steps cannot be a source. The order within a step is
    `batch_begins`, `loss_live`, `backward_done` and `batch_over` for every micro-batch, `gradients_final` and
    `step_done` for every optimizer, and `sample_over` or `numbers` once.

    Attributes:
        name: First part of the tags.
        of_parameters: Whether its sites are parameters. If their optimizer does not step in the due batch, it waits for
            the next step.
        stage: The loop whose batches it watches.
        level: Its place in overviews.
        timed: Measures the time inside the user's own code.
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
            ValueError: A pattern matches nothing; the message lists what exists.
        """

    @abstractmethod
    def labels(self) -> Sequence[str]:
        """Sites that should have a number now."""

    def batch_begins(self, batch: Batch) -> None:
        """A batch of a due step is about to enter the module."""

    def loss_live(self, loss: Tensor, scale: Tensor | float) -> None:
        """The loss is computed and its graph exists; the backward pass is next.

        Args:
            loss: The step's own loss.
            scale: The factor it has been multiplied by, for accumulation and half precision.
        """

    def backward_done(self) -> None:
        """The gradient of one micro-batch has been added; the first one is alone."""

    def gradients_final(self, step: Step) -> list[Reading]:
        """Gradients are synchronised, unscaled and accumulated, not yet clipped; weights are from before the step."""
        return []

    def step_done(self, step: Step) -> list[Reading]:
        """The optimizer has stepped."""
        return []

    def batch_over(self) -> None:
        """The batch is over; nothing may remain in the module."""

    def facts(self) -> dict[str, float]:
        """Numbers to log besides the readings, known on the host."""
        return {}

    def note(self) -> str:
        """One sentence for the log about how this source reads, printed once per wording. Empty if there is nothing to
        print.
        """
        return ""

    def detach(self) -> None:
        """Release everything, whatever the state."""

    def state_dict(self) -> dict[str, Any]:
        """State that must survive a restart: plain tensors and numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load it."""


class MatrixSource(Source):
    """A source of matrices, for statistics of their spectra.

    Attributes:
        of_changes: Whether it reads changes of weights, which can be compared with the weights.
    """

    of_changes: bool = False

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Rows and columns of every matrix that it may ever read, by label; the same on every process."""

    def units(self) -> Mapping[str, torch.Size]:
        """Shapes of the coming readings by their first label, which can be distributed over processes before they are
        read.
        """
        return {}

    def sample_over(self, team: Team) -> list[Reading]:
        """All batches of the due step are over. Called on every process at the same step, so it may communicate."""
        return []
