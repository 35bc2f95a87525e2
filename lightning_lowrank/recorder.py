"""A probe at work: from readings to numbers per site.

Shape letters:  Q statistics   all: these and whether the matrix was lost   n matrices read at once
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lowrank.decompose import decompose
from lightning_lowrank.metrics import SiteMeans
from lightning_lowrank.probe import Probe
from lightning_lowrank.registry import Needs, Statistic
from lightning_lowrank.sketch import estimate
from lightning_lowrank.sources.source import Reading
from lightning_lowrank.spectrum import Spectrum, pooled
from lightning_lowrank.statistics import find
from lightning_lowrank.subspaces import Subspace, top_subspace

# Directions compared by statistics of subspaces.
SUBSPACE_RANK = 8
ORDER: tuple[Needs, ...] = ("moments", "top", "values")


@dataclass(frozen=True)
class Group:
    """What was read of matrices that can be measured at once, and where their numbers belong."""

    columns: list[int]
    labels: list[str]
    spectrum: Spectrum
    weight: Spectrum | None
    now: Subspace | None
    before: Subspace | None


@dataclass(frozen=True)
class Staged:
    """Numbers that count once the optimizer has really stepped."""

    columns: list[int]
    values: Float[Tensor, "all n"]
    errors: Float[Tensor, "Q n"] | None
    subspaces: Mapping[str, Subspace]


class Recorder:
    """A probe at work: turns readings into numbers per site, staged until the optimizer has really stepped."""

    def __init__(self, probe: Probe, *, prefix: str | None = None, histograms: bool = False) -> None:
        self.probe = probe
        self.name = f"{prefix}_{probe.name}" if prefix else probe.name
        self.statistics: list[Statistic] = [find(name) for name in probe.statistics]
        self.sites: dict[str, int] = {}
        self.means, self.errors = self._metrics()
        self.num_solves = 0
        self.estimated = False
        self.error: str | None = None
        self.spectra: dict[str, Tensor] = {}
        self._histograms = histograms
        self._compares_subspaces = any(Subspace in statistic.takes for statistic in self.statistics)
        self._staged: dict[int, list[Staged]] = {}
        self._previous: dict[str, Subspace] = {}

    @property
    def quantities(self) -> list[str]:
        """Names of what it measures."""
        return [f"{self.name}_{statistic.name}" for statistic in self.statistics]

    @property
    def measured(self) -> set[str]:
        """Names of the rows of its reports that are numbers per site."""
        return {*self.quantities, *(f"{name}_error" for name in self.quantities)}

    def take_solves(self) -> int:
        """Calls of an eigensolver since this was last asked."""
        taken, self.num_solves = self.num_solves, 0
        return taken

    def plan(self, module: nn.Module) -> None:
        """Choose the sites; those that were known once stay known."""
        self.probe.source.plan(module)
        for label in self.probe.source.labels():
            self.sites.setdefault(label, len(self.sites))

    def record(self, optimizer: int, readings: Sequence[Reading], generator: torch.Generator) -> None:
        """Measure what was read and stage it under the optimizer's number."""
        for reading in readings:
            for label in reading.labels:
                self.sites.setdefault(label, len(self.sites))
        self._staged.setdefault(optimizer, []).extend(self._measured(group) for group in self._groups(readings, generator))

    def commit(self, optimizer: int) -> None:
        """The optimizer has stepped: what was staged counts."""
        for staged in self._staged.pop(optimizer, []):
            self._make_room(staged.values.device)
            self.means.update(staged.values, staged.columns)
            if staged.errors is not None:
                self.errors.update(staged.errors, staged.columns)
            self._previous |= staged.subspaces

    def discard(self, optimizer: int) -> None:
        """The step did not happen: what was staged never was."""
        self._staged.pop(optimizer, None)

    def begin(self) -> None:
        """Forget an earlier run."""
        self.sites, self._previous = {}, {}
        self.probe.source.load_state_dict({})
        self.means, self.errors = self._metrics()

    def abandon(self) -> None:
        """Forget the sample in the making."""
        self._staged, self.spectra, self.error = {}, {}, None
        self.means.reset()
        self.errors.reset()
        self.probe.source.detach()

    def take_error(self) -> str | None:
        """What went wrong since this was last asked."""
        taken, self.error = self.error, None
        return taken

    def report(self) -> dict[str, Tensor]:
        """Quantity -> number per site, in the order of `sites`, NaN where nothing was read; then start afresh.

        `<name>_lost` is 1 where the matrix was not finite or its decomposition failed. Spectra, where asked for, are under their own tags.
        """
        rows = dict(zip([*self.quantities, f"{self.name}_lost"], self._numbers(self.means), strict=True))
        if self.estimated:
            rows |= {f"{name}_error": row for name, row in zip(self.quantities, self._numbers(self.errors), strict=True)}
        self.means.reset()
        self.errors.reset()
        spectra, self.spectra = self.spectra, {}
        return rows | spectra

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart: plain tensors."""
        previous = {label: {"basis": s.basis, "values": s.values} for label, s in self._previous.items()}
        return {"source": self.probe.source.state_dict(), "previous": previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.probe.source.load_state_dict(state["source"])
        self._previous = {label: Subspace(**kept) for label, kept in state["previous"].items()}

    def _metrics(self) -> tuple[SiteMeans, SiteMeans]:
        """Means of the statistics and of whether a site was lost; means of the errors."""
        num_rows, num_sites = len(self.statistics) + 1, len(self.sites)
        # Every process has the same numbers: there is nothing to add up.
        return SiteMeans(num_rows, num_sites, sync_on_compute=False), SiteMeans(num_rows - 1, num_sites, sync_on_compute=False)

    def _make_room(self, device: torch.device) -> None:
        """Metrics as wide as the known sites, with what the narrower ones had: states of optimizers show only when each has stepped."""
        narrow = self.means, self.errors
        if self.means.total.shape[1] != len(self.sites) or self.means.total.device != device:
            with device:  # made there: a copy from the host would wait
                self.means, self.errors = self._metrics()
            for old, new in zip(narrow, (self.means, self.errors), strict=True):
                if not old.update_called:
                    continue
                new.total[:, : old.total.shape[1]] += old.total.to(new.total)
                new.count[: old.count.shape[0]] += old.count.to(new.count)

    def _numbers(self, metric: SiteMeans) -> Tensor:
        if not metric.update_called:
            return torch.full((metric.total.shape[0], len(self.sites)), torch.nan)
        return metric.compute().reshape(metric.total.shape)  # torchmetrics makes a single number of a single entry

    def _measured(self, group: Group) -> Staged:
        """All statistics of a group, with their errors."""
        pairs = [self._one(statistic, group) for statistic in self.statistics]
        values = torch.stack([value for value, _ in pairs])
        errors = torch.stack([error for _, error in pairs]) if self.estimated else None
        lost = torch.isnan(pooled(group.spectrum).top)
        now = group.now
        subspaces = {} if now is None else {label: Subspace(now.basis[i], now.values[i]) for i, label in enumerate(group.labels)}
        return Staged(group.columns, torch.cat([values, lost[None]]), errors, subspaces)

    def _one(self, statistic: Statistic, group: Group) -> tuple[Tensor, Tensor]:
        if statistic.takes == (Spectrum,):
            return estimate(statistic, group.spectrum)
        value = statistic(group.now, group.before) if statistic.partner == "previous" else statistic(group.spectrum, group.weight)
        return value, torch.zeros_like(value)

    def _groups(self, readings: Sequence[Reading], generator: torch.Generator) -> list[Group]:
        spectra, weights = self._spectra(readings, generator), self._weights(readings)
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for i, spectrum in enumerate(spectra):
            alike[self._kind(spectrum), weights[i].values.shape[-1] if weights else 0].append(i)
        return [
            self._group(
                [readings[i] for i in members],
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

    def _group(self, readings: Sequence[Reading], spectrum: Spectrum, weight: Spectrum | None) -> Group:
        labels = [label for reading in readings for label in reading.labels]
        now = before = None
        if self._compares_subspaces:
            matrices = [r.value.reshape(-1, *r.value.shape[-2:]) for r in readings if isinstance(r.value, Tensor)]
            now = top_subspace(torch.cat(matrices), SUBSPACE_RANK)
            before = self._before(labels, now)
        return Group([self.sites[label] for label in labels], labels, spectrum, weight, now, before)

    def _before(self, labels: Sequence[str], now: Subspace) -> Subspace:
        """The subspaces of the last sample; NaN where there was none of that shape."""
        nothing = Subspace(torch.full_like(now.basis[0], torch.nan), torch.full_like(now.values[0], torch.nan))
        known = [self._previous.get(label, nothing) for label in labels]
        known = [k if k.basis.shape == nothing.basis.shape else nothing for k in known]
        return Subspace(torch.stack([k.basis.to(now.basis) for k in known]), torch.stack([k.values.to(now.values) for k in known]))

    def _spectra(self, readings: Sequence[Reading], generator: torch.Generator) -> list[Spectrum]:
        """One spectrum per reading, as much of it as the statistics need."""
        needs: Needs = max((s.needs for s in self.statistics if s.takes[0] is Spectrum), key=ORDER.index, default="moments")
        if self._histograms:
            needs = "values"
        matrices = [r.value for r in readings if isinstance(r.value, Tensor)]
        solved = decompose(matrices, needs, generator=generator)
        self.num_solves += solved.num_solves
        found = iter(solved.spectra)
        spectra = [r.value if isinstance(r.value, Spectrum) else next(found) for r in readings]
        self.estimated |= any(s.num_probes for s in spectra)
        if self._histograms:
            whole = [(r.labels, _flat(s.magnitudes, 0)) for r, s in zip(readings, spectra, strict=True) if s.whole]
            self.spectra |= {
                f"{self.name}_spectrum/{label}": row for labels, rows in whole for label, row in zip(labels, rows, strict=True)
            }
        return spectra

    def _weights(self, readings: Sequence[Reading]) -> list[Spectrum]:
        """The weights beside the readings, where a statistic compares with them."""
        if not any(statistic.partner == "weight" for statistic in self.statistics):
            return []
        return decompose([r.site.weight() if r.weight is None else r.weight for r in readings if r.site is not None], "top").spectra


def _joined(spectra: Sequence[Spectrum]) -> Spectrum:
    """Spectra of one kind as one batch `[n, K]`, behind the axis of probes where there is one."""
    first, axis = spectra[0], int(spectra[0].num_probes > 0)
    values, weights = (torch.cat([_flat(getattr(s, field), axis) for s in spectra], axis) for field in ("values", "weights"))
    coarse = [s.coarse for s in spectra if s.coarse is not None]
    return replace(first, values=values, weights=weights, coarse=_joined(coarse) if coarse else None)


def _flat(tensor: Tensor, axis: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:axis], -1, tensor.shape[-1])
