"""Number sources at work: finished numbers, of the whole model or of each site."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.measuring.matrix_recorder import MatrixRecorder
from lightning_lowrank.measuring.number_source import Curve, Detail, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.recorder import BATCH, Recorder
from lightning_lowrank.measuring.results import Results, Staged
from lightning_lowrank.measuring.source import Step


class NumberRecorder(Recorder):
    """A probe of a number source at work: keeps its numbers as they are.

    Args:
        probe: What to measure; its source is a `NumberSource`.
        prefix: Of all tags.
    """

    def __init__(self, probe: Probe, *, prefix: str | None = None) -> None:
        assert isinstance(probe.source, NumberSource)
        self._source, self._prefix = probe.source, f"{prefix}_" if prefix else ""
        asked = {quantity.name: quantity for quantity in self._source.quantities}
        self._asked: list[Quantity] = [asked[name] for name in probe.statistics]
        self._device = torch.device("cpu")
        super().__init__(probe, prefix=prefix)

    @property
    def quantities(self) -> list[str]:
        """Names of what it measures."""
        return [self._prefix + quantity.name for quantity in self._asked]

    @property
    def units(self) -> list[str]:
        """Their units."""
        return [quantity.unit for quantity in self._asked]

    @property
    def measured(self) -> set[str]:
        """Quantities that the model has, and the errors of estimated ones."""
        there = [quantity for quantity in self._asked if quantity.name not in self._source.absent]
        names = {self._prefix + quantity.name for quantity in there}
        return names | {f"{self._prefix}{quantity.name}_error" for quantity in there if quantity.estimated}

    @property
    def curves(self) -> list[Curve]:
        """Its vectors."""
        with_prefix = (
            (curve, self._prefix + curve.name, curve.middles and self._prefix + curve.middles)
            for curve in self._source.curves
        )
        return [replace(curve, name=name, middles=middles) for curve, name, middles in with_prefix]

    def is_global(self, quantity: str) -> bool:
        """Whether it is one number for the whole model."""
        return not any(asked.per_site for asked in self._named(quantity))

    def detail(self, quantity: str) -> Detail:
        """Least detail at which loggers get it."""
        return next((asked.detail for asked in self._named(quantity)), "all")

    def gradients_final(self, optimizer: int, step: Step, generator: torch.Generator, team: Team) -> None:
        """Let the source read for itself."""
        self._source.gradients_final(step)

    def step_done(self, optimizer: int, step: Step, generator: torch.Generator, team: Team) -> None:
        """Let the source read for itself."""
        self._source.step_done(step)

    def sample_over(self, generator: torch.Generator, team: Team) -> None:
        """Stage the numbers of the sample: each process its share, or one for all, which have the same."""
        self._device = generator.device
        found = self._source.numbers(team)
        trouble, self._source.trouble = self._source.trouble, None
        if trouble is not None:
            self.error = f"{type(trouble).__name__}: {trouble}"
        self._results.know({}, [numbers.site for numbers in found])
        self.expected |= dict.fromkeys(numbers.site for numbers in found)
        if found and (self._source.shared or team.rank == 0):
            self._staged[BATCH] = [self._laid_out(found)]

    def report(self) -> dict[str, Tensor]:
        """Also the vectors, `[axis, sites]`."""
        means, errors, _ = self._results.take()
        vectors = means[len(self._asked) + 1 :].split([len(curve.axis) for curve in self.curves])
        return self._rows(means, errors) | dict(zip([curve.name for curve in self.curves], vectors, strict=True))

    def _named(self, quantity: str) -> list[Quantity]:
        plain = quantity.removeprefix(self._prefix).removesuffix("_error")
        return [asked for asked in self._asked if asked.name == plain]

    def _laid_out(self, found: Sequence[Numbers]) -> Staged:
        like = torch.zeros((), dtype=working_dtype(self._device), device=self._device)
        values = torch.stack([_column(self._asked, numbers.values, like) for numbers in found], -1)
        errors = torch.stack([_column(self._asked, numbers.errors, like) for numbers in found], -1)
        lost = torch.isnan(values).all(0)
        vectors = [
            torch.stack([_vector(curve, numbers, like) for numbers in found], -1) for curve in self._source.curves
        ]
        return Staged([numbers.site for numbers in found], torch.cat([values, lost[None], *vectors]), errors, {})

    def _fresh(self) -> Results:
        results = Results(
            len(self._asked),
            spectra=False,
            subspaces=False,
            num_orders=sum(len(curve.axis) for curve in self._source.curves),
        )
        # Which of them are estimates may differ from sample to sample.
        results.estimated = True
        return results


def _column(asked: Sequence[Quantity], known: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """What is known of each quantity, NaN where nothing is."""
    nothing = torch.full_like(like, torch.nan)
    return torch.stack([known.get(quantity.name, nothing).to(like) for quantity in asked])


def _vector(curve: Curve, numbers: Numbers, like: Tensor) -> Tensor:
    known = numbers.curves.get(curve.name)
    return like.new_full((len(curve.axis),), torch.nan) if known is None else known.to(like)


def recorder_of(probe: Probe, prefix: str | None, *, histograms: bool) -> Recorder:
    """The recorder for the readings of a probe."""
    if isinstance(probe.source, NumberSource):
        return NumberRecorder(probe, prefix=prefix)
    return MatrixRecorder(probe, prefix=prefix, histograms=histograms)
