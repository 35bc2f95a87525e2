"""A probe at work: numbers per site, staged until the optimizer has really stepped."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.metrics import SiteMeans
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Curve, Detail
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.results import Results, Staged
from lightning_lowrank.measuring.source import Step
from lightning_lowrank.models.training import Training

# Stands for all processes and optimizers where readings belong to the batch rather than to one optimizer.
BATCH = -1


class Recorder(ABC):
    """A probe at work: turns what its source gives into numbers per site, staged until the optimizer has really
    stepped.

    Attributes:
        expected: Sites that are to have a number.
        error: What went wrong since it was last asked for.
    """

    def __init__(self, probe: Probe, *, prefix: str | None = None) -> None:
        self.probe = probe
        self.name = f"{prefix}_{probe.name}" if prefix else probe.name
        self.expected: dict[str, None] = {}
        self.error: str | None = None
        self._planned: set[str] = set()
        self._results = self._fresh()
        self._staged: dict[int, list[Staged]] = {}
        # In how many parts work is put off; 0 where it is done at once.
        self.num_parts = 0

    @property
    @abstractmethod
    def quantities(self) -> list[str]:
        """Names of what it measures."""

    @property
    @abstractmethod
    def units(self) -> list[str]:
        """Their units."""

    @property
    def orders(self) -> str:
        """Name of the row of its reports that has the order statistics of each site; there may be none."""
        return ""

    @property
    def curves(self) -> list[Curve]:
        """Rows of its reports that have a vector of each site; there may be none."""
        return []

    @property
    def measured(self) -> set[str]:
        """Names of the rows of its reports that are numbers per site."""
        return {*self.quantities, *(f"{name}_error" for name in self.quantities)}

    @property
    def sites(self) -> Sequence[str]:
        """Every site that it knows, in the order of its reports."""
        return list(self._results.columns)

    @property
    def means(self) -> SiteMeans:
        """The numbers of the sample being taken."""
        return self._results.means

    def is_global(self, quantity: str) -> bool:
        """Whether it is one number for the whole model."""
        return False

    def detail(self, quantity: str) -> Detail:
        """Least detail at which loggers get it."""
        return "core"

    def sites_of(self, quantity: str) -> list[str]:
        """Where a quantity exists: the whole model, or sites."""
        return [site for site in self.expected if (site == WHOLE_MODEL) == self.is_global(quantity)]

    def shape(self, site: str) -> tuple[int, int] | None:
        """Rows and columns of the matrix there, None where it was never read."""
        return self._results.shape(site)

    def take_solves(self) -> int:
        """Calls of an eigensolver since this was last asked."""
        return 0

    def plan(self, training: Training) -> None:
        """Choose the sites; those that were known once stay known."""
        self.probe.source.plan(training)
        labels = list(self.probe.source.labels())
        # A site that is frozen, pruned away or renamed is not missed.
        for gone in self._planned - set(labels):
            self.expected.pop(gone, None)
        self._planned = set(labels)
        self.expected |= dict.fromkeys(labels)
        self._results.know(self._shapes(), self.expected)

    def share(self, team: Team) -> None:
        """Share out what will be read, so that it does not depend on what goes wrong when it is."""

    @abstractmethod
    def gradients_final(self, optimizer: int, step: Step, generator: torch.Generator, team: Team) -> None:
        """Stage what is read before a step under the optimizer's number."""

    @abstractmethod
    def step_done(self, optimizer: int, step: Step, generator: torch.Generator, team: Team) -> None:
        """Stage what is read after a step under the optimizer's number."""

    @abstractmethod
    def sample_over(self, generator: torch.Generator, team: Team) -> None:
        """Stage what belongs to the batches rather than to an optimizer, under `BATCH`."""

    def commit(self, optimizer: int) -> None:
        """The optimizer has stepped: what was staged counts."""
        for staged in self._staged.pop(optimizer, []):
            self._results.add(staged)

    def discard(self, optimizer: int) -> None:
        """The step did not happen: what was staged never was."""
        self._staged.pop(optimizer, None)

    @property
    def is_late(self) -> bool:
        """Whether work was put off that is still to be done."""
        return False

    def work(self, shares: int = 1) -> None:
        """Do a share of the work that was put off, of so many that are left."""

    def begin(self) -> None:
        """Forget an earlier run."""
        self.expected, self._planned = {}, set()
        self.probe.source.load_state_dict({})
        self._results = self._fresh()

    def abandon(self) -> None:
        """Drop the unfinished sample."""
        self._staged, self.error = {}, None
        self._results.drop()
        try:
            self.probe.source.detach()
        except Exception as error:  # this is called at the end of a run, where nothing may raise
            self.error = f"{type(error).__name__}: {error}"

    def take_error(self) -> str | None:
        """The failure since the last query."""
        taken, self.error = self.error, None
        return taken

    def packed(self, device: torch.device) -> Tensor:
        """The results of this process as one vector, to be summed over all processes."""
        self._results.know(self._shapes())
        return self._results.packed(device)

    def unpack(self, vector: Tensor) -> None:
        """Take the sum in its place."""
        self._results.unpack(vector)

    def report(self) -> dict[str, Tensor]:
        """Quantity -> number per site, in the order of `sites`, NaN where nothing was read; then start afresh.

        `<name>_lost` is 1 where there is no number.
        """
        means, errors, _ = self._results.take()
        return self._rows(means, errors)

    def state_dict(self) -> dict[str, Any]:
        """State that must survive a restart: plain tensors."""
        return {"source": self.probe.source.state_dict(), "previous": self._results.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.probe.source.load_state_dict(state["source"])
        self._results.load_state_dict(state["previous"])

    def _rows(self, means: Float[Tensor, "all S"], errors: Float[Tensor, "Q S"]) -> dict[str, Tensor]:
        rows = dict(zip([*self.quantities, f"{self.name}_lost"], means, strict=False))
        if self._results.estimated:
            rows |= {f"{name}_error": row for name, row in zip(self.quantities, errors, strict=True)}
        return rows

    def _shapes(self) -> Mapping[str, tuple[int, int]]:
        """Rows and columns of every matrix that it may ever measure, by label."""
        return {}

    @abstractmethod
    def _fresh(self) -> Results: ...
