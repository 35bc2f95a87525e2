"""Matrices at work: from readings to spectra, statistics and numbers per site.

Shape letters:  n matrices read at once
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from operator import itemgetter

import torch
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.decompose import decompose, flops
from lightning_lowrank.maths.spectra.order_statistics import COUNT, order_statistics
from lightning_lowrank.maths.spectra.sketch import estimate
from lightning_lowrank.maths.spectra.spectrum import Needs, Spectrum, pooled
from lightning_lowrank.maths.spectra.subspaces import Subspace, top_subspaces
from lightning_lowrank.measuring.gathering import Gathered, gather
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.recorder import BATCH, Recorder
from lightning_lowrank.measuring.results import BASIS, LAST, SPECTRUM, SUBSPACE_RANK, VALUES, Results, Staged
from lightning_lowrank.measuring.source import MatrixSource, Reading, Step
from lightning_lowrank.statistics import find
from lightning_lowrank.statistics.registry import Statistic

# Share of the entries of a change in half precision that do not move, above which its effective ranks are of rounding:
# that of a bf16 update of rank 4 reads 8.
UNCHANGED = 0.02
ORDER: tuple[Needs, ...] = ("moments", "top", "values")

# Bytes of copies that a recorder keeps for later; what takes more is decomposed at once.
KEPT = 2**26


@dataclass(frozen=True)
class Group:
    """Readings of matrices that can be measured together."""

    labels: list[str]
    spectrum: Spectrum
    weight: Spectrum | None
    now: Subspace | None
    before: Subspace | None
    # Of the last sample, where spectra are compared.
    last: Spectrum | None
    # Of each matrix whether its small singular values are of rounding; None where none is in half precision.
    stuck: Tensor | None = None


class MatrixRecorder(Recorder):
    """A probe of matrices at work: turns readings into statistics of their spectra, each process for its share.

    Args:
        probe: What to measure.
        prefix: Of all tags.
        histograms: Keep the spectra.
    """

    def __init__(self, probe: Probe, *, prefix: str | None = None, histograms: bool = False) -> None:
        assert isinstance(probe.source, MatrixSource)
        self._source = probe.source
        self.statistics: list[Statistic] = [find(name) for name in probe.statistics]
        self.num_solves = 0
        self._histograms = histograms
        self._compares_subspaces = any(Subspace in statistic.takes for statistic in self.statistics)
        self._compares_spectra = any(s.partner == "previous" and Spectrum in s.takes for s in self.statistics)
        # Where a statistic reads all singular values they cost nothing; they are not decomposed for.
        self.needs: Needs = max(
            (s.needs for s in self.statistics if s.takes[0] is Spectrum), key=ORDER.index, default="moments"
        )
        self.needs = "values" if histograms else self.needs
        self._owners: dict[str, int] = {}
        # By optimizer what was put off, and what of it counts, because the optimizer has stepped.
        self._put_off: dict[int, list[Callable[[], list[Staged]]]] = {}
        self._late: list[Callable[[], list[Staged]]] = []
        super().__init__(probe, prefix=prefix)

    @property
    def quantities(self) -> list[str]:
        """Names of what it measures."""
        return [f"{self.name}_{statistic.name}" for statistic in self.statistics]

    @property
    def units(self) -> list[str]:
        """Their units."""
        return [statistic.unit for statistic in self.statistics]

    @property
    def orders(self) -> str:
        """Name of the row of its reports that has the order statistics of each site, where there are any."""
        return f"{self.name}_orders"

    @property
    def owners(self) -> Mapping[str, int]:
        """Which process measures what can be distributed before it is read, by the first label."""
        return self._owners

    def take_solves(self) -> int:
        """Calls of an eigensolver since this was last asked."""
        taken, self.num_solves = self.num_solves, 0
        return taken

    def share(self, team: Team) -> None:
        """Share out what will be read, so that it does not depend on what goes wrong when it is."""
        units = self._source.units()
        self._owners = dict(zip(units, team.assign([flops(shape) for shape in units.values()]), strict=True))

    def gradients_final(self, optimizer: int, step: Step, generator: torch.Generator, team: Team) -> None:
        """Measure what is read before a step."""
        self._record(optimizer, self._source.gradients_final(step), generator, team)

    def step_done(self, optimizer: int, step: Step, generator: torch.Generator, team: Team) -> None:
        """Measure what is read after a step."""
        self._record(optimizer, self._source.step_done(step), generator, team)

    def sample_over(self, generator: torch.Generator, team: Team) -> None:
        """Measure what belongs to the batches."""
        self._record(BATCH, self._source.sample_over(team), generator, team)

    def commit(self, optimizer: int) -> None:
        """Deferred measurements count from now on, too."""
        super().commit(optimizer)
        self._late += self._put_off.pop(optimizer, [])

    def discard(self, optimizer: int) -> None:
        """Nor will it be measured."""
        super().discard(optimizer)
        self._put_off.pop(optimizer, None)

    def abandon(self) -> None:
        """Forget also what was put off."""
        self._put_off, self._late = {}, []
        super().abandon()

    @property
    def is_late(self) -> bool:
        """Whether matrices are still to be decomposed."""
        return bool(self._late)

    def work(self, shares: int = 1) -> None:
        """Decompose a share of what was put off."""
        for _ in range(-(-len(self._late) // shares)):
            for staged in self._late.pop(0)():
                self._results.add(staged)

    def _record(self, optimizer: int, readings: Sequence[Reading], generator: torch.Generator, team: Team) -> None:
        """Measure what of the readings is this process's to measure, and stage it under the optimizer's number; or put
        that off.
        """
        if not readings:
            return
        self._results.know(
            {label: (reading.shape[-2], reading.shape[-1]) for reading in readings for label in reading.labels}
        )
        self.expected |= dict.fromkeys(label for reading in readings if reading.parts for label in reading.labels)
        beside = any(statistic.partner == "weight" for statistic in self.statistics)
        rounds = gather(
            readings, self._share(readings, team), team, spectra_only=not self._compares_subspaces, beside=beside
        )
        if self.num_parts:
            taken = [one for found in rounds for one in found]
            if sum(one.num_bytes for one in taken) <= KEPT:
                parts = _parts([one.kept() for one in taken], self.num_parts)
                self._put_off.setdefault(optimizer, []).extend(partial(self._all, part, generator) for part in parts)
                return
            rounds = iter([taken])
        staged = self._staged.setdefault(optimizer, [])
        troubles: list[Exception] = []
        # Not a loop, whose variable would hold a round's matrices while the next are gathered.
        for found in map(partial(self._attempted, generator=generator, troubles=troubles), rounds):
            staged.extend(found)
        if troubles:
            raise troubles[0]

    def _attempted(
        self, taken: Sequence[Gathered], *, generator: torch.Generator, troubles: list[Exception]
    ) -> list[Staged]:
        """Measure a round; what goes wrong is told when all rounds are over, which other processes wait for."""
        try:
            return self._all(taken, generator)
        except Exception as error:
            troubles.append(error.with_traceback(None))  # without the tensors that it would hold
            return []

    def report(self) -> dict[str, Tensor]:
        """Also the order statistics; spectra, where asked for, are under their own tags."""
        means, errors, spectra = self._results.take()
        rows = self._rows(means, errors)
        if self.needs == "values":
            rows[self.orders] = means[len(self.statistics) + 1 :]
        return rows | {f"{self.name}_spectrum/{label}": row for label, row in spectra.items()}

    def _share(self, readings: Sequence[Reading], team: Team) -> list[int]:
        """Who measures each of the readings."""
        new = {reading.labels[0]: flops(reading.shape) for reading in readings if reading.labels[0] not in self._owners}
        owners = self._owners | dict(zip(new, team.assign(list(new.values())), strict=True))
        return [owners[reading.labels[0]] for reading in readings]

    def _shapes(self) -> Mapping[str, tuple[int, int]]:
        return self._source.shapes()

    def _fresh(self) -> Results:
        orders = 1 + COUNT if self.needs == "values" else 0
        return Results(
            len(self.statistics),
            spectra=self._histograms,
            subspaces=self._compares_subspaces,
            lasting=self._compares_spectra,
            num_orders=orders,
        )

    def _all(self, taken: Sequence[Gathered], generator: torch.Generator) -> list[Staged]:
        return [self._measured(group) for group in self._groups(taken, generator)]

    def _measured(self, group: Group) -> Staged:
        """All statistics of a group, with their errors."""
        pairs = [self._one(statistic, group) for statistic in self.statistics]
        values = torch.stack([value for value, _ in pairs])
        errors = torch.stack([error for _, error in pairs]) if self._results.estimated else None
        lost = torch.isnan(pooled(group.spectrum).top)
        kept: dict[str, Sequence[Tensor]] = {}
        if self._histograms and group.spectrum.whole:
            kept[SPECTRUM] = list(group.spectrum.magnitudes)
        if group.last is not None and group.spectrum.whole:
            kept[LAST] = list(group.spectrum.magnitudes)
        if group.now is not None:
            kept |= {BASIS: list(group.now.basis), VALUES: list(group.now.values)}
        orders = [order_statistics(group.spectrum).to(values)] if self.needs == "values" else []
        return Staged(group.labels, torch.cat([values, lost[None], *orders]), errors, kept)

    def _one(self, statistic: Statistic, group: Group) -> tuple[Tensor, Tensor]:
        if statistic.takes == (Spectrum,):
            value, error = estimate(statistic, group.spectrum)
            if group.stuck is not None and "effective_rank" in statistic.name:
                value = torch.where(group.stuck, torch.nan, value)
            return value, error
        if Subspace in statistic.takes:
            value = statistic(group.now, group.before)
        else:
            value = statistic(group.spectrum, group.last if statistic.partner == "previous" else group.weight)
        return value, torch.zeros_like(value)

    def _groups(self, taken: Sequence[Gathered], generator: torch.Generator) -> list[Group]:
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

    def _group(self, taken: Sequence[Gathered], spectrum: Spectrum, weight: Spectrum | None) -> Group:
        labels = [label for one in taken for label in one.labels]
        now = before = None
        if self._compares_subspaces:
            now = top_subspaces([t.value for t in taken if isinstance(t.value, Tensor)], SUBSPACE_RANK)
            before = self._results.before(labels, now)
        last = self._results.spectrum_before(labels, spectrum) if self._compares_spectra else None
        stuck = torch.cat([_stuck(one) for one in taken]) if any(one.rounded for one in taken) else None
        return Group(labels, spectrum, weight, now, before, last, stuck)

    def _spectra(self, values: Sequence[Tensor | Spectrum], needs: Needs, generator: torch.Generator) -> list[Spectrum]:
        """One spectrum per value, as much of it as is needed."""
        solved = decompose([value for value in values if isinstance(value, Tensor)], needs, generator=generator)
        self.num_solves += solved.num_solves
        found = iter(solved.spectra)
        spectra = [value if isinstance(value, Spectrum) else next(found) for value in values]
        self._results.estimated |= any(spectrum.num_probes for spectrum in spectra)
        return spectra


def _stuck(one: Gathered) -> Tensor:
    """Of each matrix whether more of its entries than `UNCHANGED` are 0, rows and columns left out in which all are."""
    if not isinstance(one.value, Tensor):
        return torch.zeros(len(one.labels), dtype=torch.bool, device=one.value.values.device)
    moved = (one.value != 0).reshape(-1, *one.value.shape[-2:])
    touched = moved.any(-1, keepdim=True) & moved.any(-2, keepdim=True)
    return ((touched & ~moved).sum((-2, -1)) > UNCHANGED * touched.sum((-2, -1))) & one.rounded


def _parts(taken: Sequence[Gathered], count: int) -> Iterator[list[Gathered]]:
    """At most so many parts with about as much work each, in their order."""
    work = [flops(one.shape) for one in taken]
    middles = (end - own / 2 for end, own in zip(accumulate(work), work, strict=True))
    numbers = (int(count * middle / (sum(work) or 1.0)) for middle in middles)
    for _, part in groupby(zip(numbers, taken, strict=True), key=itemgetter(0)):
        yield [one for _, one in part]


def _joined(spectra: Sequence[Spectrum]) -> Spectrum:
    """Spectra of one kind as one batch `[n, K]`, behind the axis of probes where there is one."""
    first, axis = spectra[0], int(spectra[0].num_probes > 0)
    values, weights = (
        torch.cat([_flat(getattr(s, field), axis) for s in spectra], axis) for field in ("values", "weights")
    )
    coarse = [s.coarse for s in spectra if s.coarse is not None]
    return replace(first, values=values, weights=weights, coarse=_joined(coarse) if coarse else None)


def _flat(tensor: Tensor, axis: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:axis], -1, tensor.shape[-1])
