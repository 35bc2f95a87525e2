"""A probe at work: from readings to numbers per site.

Shape letters:  n matrices read at once
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowrank.decompose import decompose, flops
from lightning_lowrank.metrics import SiteMeans
from lightning_lowrank.order_statistics import COUNT, order_statistics
from lightning_lowrank.probe import Probe
from lightning_lowrank.registry import Needs, Statistic
from lightning_lowrank.results import BASIS, SPECTRUM, SUBSPACE_RANK, VALUES, Results, Staged
from lightning_lowrank.sketch import estimate
from lightning_lowrank.sources.source import Reading
from lightning_lowrank.spectrum import Spectrum, pooled
from lightning_lowrank.statistics import find
from lightning_lowrank.subspaces import Subspace, top_subspaces
from lightning_lowrank.taken import Taken, take
from lightning_lowrank.team import Team

ORDER: tuple[Needs, ...] = ("moments", "top", "values")


@dataclass(frozen=True)
class Group:
    """What was read of matrices that can be measured at once."""

    labels: list[str]
    spectrum: Spectrum
    weight: Spectrum | None
    now: Subspace | None
    before: Subspace | None


class Recorder:
    """A probe at work: turns readings into numbers per site, staged until the optimizer has really stepped.

    Attributes:
        expected: Sites that are to have a number.
        error: What went wrong since it was last asked for.
    """

    def __init__(self, probe: Probe, *, prefix: str | None = None, histograms: bool = False) -> None:
        self.probe = probe
        self.name = f"{prefix}_{probe.name}" if prefix else probe.name
        self.statistics: list[Statistic] = [find(name) for name in probe.statistics]
        self.expected: dict[str, None] = {}
        self.num_solves = 0
        self.error: str | None = None
        self._histograms = histograms
        self._compares_subspaces = any(Subspace in statistic.takes for statistic in self.statistics)
        # Where a statistic reads all singular values they cost nothing; they are not decomposed for.
        self.needs: Needs = max((s.needs for s in self.statistics if s.takes[0] is Spectrum), key=ORDER.index, default="moments")
        self.needs = "values" if histograms else self.needs
        self._results = self._fresh()
        self._staged: dict[int, list[Staged]] = {}
        self._owners: dict[str, int] = {}

    @property
    def quantities(self) -> list[str]:
        """Names of what it measures."""
        return [f"{self.name}_{statistic.name}" for statistic in self.statistics]

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

    @property
    def orders(self) -> str:
        """Name of the row of its reports that has the order statistics of each site, where there are any."""
        return f"{self.name}_orders"

    def shape(self, site: str) -> tuple[int, int]:
        """Rows and columns of the matrix there."""
        return self._results.shape(site)

    def take_solves(self) -> int:
        """Calls of an eigensolver since this was last asked."""
        taken, self.num_solves = self.num_solves, 0
        return taken

    def plan(self, module: nn.Module) -> None:
        """Choose the sites; those that were known once stay known."""
        self.probe.source.plan(module)
        self.expected |= dict.fromkeys(self.probe.source.labels())
        self._results.know(self.probe.source.shapes(), self.expected)

    def share(self, team: Team) -> None:
        """Share out what will be read, so that it does not depend on what goes wrong when it is."""
        units = self.probe.source.units()
        self._owners = dict(zip(units, team.assigned([flops(shape) for shape in units.values()]), strict=True))

    def record(self, optimizer: int, readings: Sequence[Reading], generator: torch.Generator, team: Team) -> None:
        """Measure what of the readings is this process's to measure, and stage it under the optimizer's number."""
        self._results.know({label: (reading.shape[-2], reading.shape[-1]) for reading in readings for label in reading.labels})
        self.expected |= dict.fromkeys(label for reading in readings if reading.parts for label in reading.labels)
        beside = any(statistic.partner == "weight" for statistic in self.statistics)
        taken = take(readings, self._share(readings, team), team, spectra_only=not self._compares_subspaces, beside=beside)
        self._staged.setdefault(optimizer, []).extend(self._measured(group) for group in self._groups(taken, generator))

    def commit(self, optimizer: int) -> None:
        """The optimizer has stepped: what was staged counts."""
        for staged in self._staged.pop(optimizer, []):
            self._results.add(staged)

    def discard(self, optimizer: int) -> None:
        """The step did not happen: what was staged never was."""
        self._staged.pop(optimizer, None)

    def begin(self) -> None:
        """Forget an earlier run."""
        self.expected = {}
        self.probe.source.load_state_dict({})
        self._results = self._fresh()

    def abandon(self) -> None:
        """Forget the sample in the making."""
        self._staged, self.error = {}, None
        self._results.drop()
        self.probe.source.detach()

    def take_error(self) -> str | None:
        """What went wrong since this was last asked."""
        taken, self.error = self.error, None
        return taken

    def packed(self, device: torch.device) -> Tensor:
        """What was found here, as one vector to be added up over all processes."""
        self._results.know(self.probe.source.shapes())
        return self._results.packed(device)

    def unpack(self, vector: Tensor) -> None:
        """Take the sum in its place."""
        self._results.unpack(vector)

    def report(self) -> dict[str, Tensor]:
        """Quantity -> number per site, in the order of `sites`, NaN where nothing was read; then start afresh.

        `<name>_lost` is 1 where the matrix was not finite or its decomposition failed. Spectra, where asked for, are under their own tags.
        """
        means, errors, spectra = self._results.take()
        rows = dict(zip([*self.quantities, f"{self.name}_lost"], means, strict=False))
        if self.needs == "values":
            rows[self.orders] = means[len(rows) :]
        if self._results.estimated:
            rows |= {f"{name}_error": row for name, row in zip(self.quantities, errors, strict=True)}
        return rows | {f"{self.name}_spectrum/{label}": row for label, row in spectra.items()}

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart: plain tensors."""
        return {"source": self.probe.source.state_dict(), "previous": self._results.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.probe.source.load_state_dict(state["source"])
        self._results.load_state_dict(state["previous"])

    def _share(self, readings: Sequence[Reading], team: Team) -> list[int]:
        """Who measures each of the readings."""
        new = {reading.labels[0]: flops(reading.shape) for reading in readings if reading.labels[0] not in self._owners}
        owners = self._owners | dict(zip(new, team.assigned(list(new.values())), strict=True))
        return [owners[reading.labels[0]] for reading in readings]

    def _fresh(self) -> Results:
        orders = 1 + COUNT if self.needs == "values" else 0
        return Results(len(self.statistics), spectra=self._histograms, subspaces=self._compares_subspaces, num_orders=orders)

    def _measured(self, group: Group) -> Staged:
        """All statistics of a group, with their errors."""
        pairs = [self._one(statistic, group) for statistic in self.statistics]
        values = torch.stack([value for value, _ in pairs])
        errors = torch.stack([error for _, error in pairs]) if self._results.estimated else None
        lost = torch.isnan(pooled(group.spectrum).top)
        kept: dict[str, Sequence[Tensor]] = {}
        if self._histograms and group.spectrum.whole:
            kept[SPECTRUM] = list(group.spectrum.magnitudes)
        if group.now is not None:
            kept |= {BASIS: list(group.now.basis), VALUES: list(group.now.values)}
        orders = [order_statistics(group.spectrum).to(values)] if self.needs == "values" else []
        return Staged(group.labels, torch.cat([values, lost[None], *orders]), errors, kept)

    def _one(self, statistic: Statistic, group: Group) -> tuple[Tensor, Tensor]:
        if statistic.takes == (Spectrum,):
            return estimate(statistic, group.spectrum)
        value = statistic(group.now, group.before) if statistic.partner == "previous" else statistic(group.spectrum, group.weight)
        return value, torch.zeros_like(value)

    def _groups(self, taken: Sequence[Taken], generator: torch.Generator) -> list[Group]:
        spectra = self._spectra([t.value for t in taken], self.needs, generator)
        weights = self._spectra([t.weight for t in taken if t.weight is not None], "top", generator)
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for i, spectrum in enumerate(spectra):
            alike[self._kind(spectrum), weights[i].values.shape[-1] if weights else 0].append(i)
        return [
            self._group(
                [taken[i] for i in members],
                _joined([spectra[i] for i in members]),
                _joined([weights[i] for i in members]) if weights else None,
            )
            for members in alike.values()
        ]

    def _kind(self, spectrum: Spectrum) -> Hashable:
        """What spectra must share to be measured at once: the fewer groups the less overhead."""
        shape: tuple[int, ...] = ()
        if any(statistic.reads_shape for statistic in self.statistics):
            shape = tuple(sorted(spectrum.shape))  # no statistic tells a matrix from its transpose
        if self._compares_subspaces:
            shape = spectrum.shape
        return shape, spectrum.values.shape[-1], spectrum.num_probes, spectrum.whole

    def _group(self, taken: Sequence[Taken], spectrum: Spectrum, weight: Spectrum | None) -> Group:
        labels = [label for one in taken for label in one.labels]
        now = before = None
        if self._compares_subspaces:
            now = top_subspaces([t.value for t in taken if isinstance(t.value, Tensor)], SUBSPACE_RANK)
            before = self._results.before(labels, now)
        return Group(labels, spectrum, weight, now, before)

    def _spectra(self, values: Sequence[Tensor | Spectrum], needs: Needs, generator: torch.Generator) -> list[Spectrum]:
        """One spectrum per value, as much of it as is needed."""
        solved = decompose([value for value in values if isinstance(value, Tensor)], needs, generator=generator)
        self.num_solves += solved.num_solves
        found = iter(solved.spectra)
        spectra = [value if isinstance(value, Spectrum) else next(found) for value in values]
        self._results.estimated |= any(spectrum.num_probes for spectrum in spectra)
        return spectra


def _joined(spectra: Sequence[Spectrum]) -> Spectrum:
    """Spectra of one kind as one batch `[n, K]`, behind the axis of probes where there is one."""
    first, axis = spectra[0], int(spectra[0].num_probes > 0)
    values, weights = (torch.cat([_flat(getattr(s, field), axis) for s in spectra], axis) for field in ("values", "weights"))
    coarse = [s.coarse for s in spectra if s.coarse is not None]
    return replace(first, values=values, weights=weights, coarse=_joined(coarse) if coarse else None)


def _flat(tensor: Tensor, axis: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:axis], -1, tensor.shape[-1])
