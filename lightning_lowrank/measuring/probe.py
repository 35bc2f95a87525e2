"""A probe: one source, the statistics asked of it, and when."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from re import fullmatch

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.measuring.number_source import NumberSource
from lightning_lowrank.measuring.schedules import Every, Schedule
from lightning_lowrank.measuring.source import MatrixSource, Source
from lightning_lowrank.statistics import available, find


@dataclass(frozen=True)
class Probe:
    """What to measure, from which source, and when.

    Args:
        name: First part of the tags, as in `gradient_stable_rank`.
        source: Source of the matrices or numbers.
        statistics: Names of statistics; for a `NumberSource`, those of its quantities.
        schedule: `step -> bool`; a number n is `Every(n)`.

    Raises:
        ValueError: There is no such statistic, or the source cannot offer it; the message lists what would work.
    """

    name: str
    source: Source
    statistics: Sequence[str]
    schedule: Every | Schedule | int = field(default_factory=lambda: Every(50))

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise ValueError(
                f"Probe(name={self.name!r}): the name begins its tags and may contain only letters, digits and _.-"
            )
        if not isinstance(self.source, Source):
            made = f"{self.source.__name__}(...)" if isinstance(self.source, type) else "Gradients()"
            raise ValueError(f"probe {self.name!r}: source={self.source!r} is not a source; create one, such as {made}")
        if type(self.schedule) is int:
            object.__setattr__(self, "schedule", Every(self.schedule))
        if not callable(self.schedule):
            raise ValueError(
                f"probe {self.name!r}: schedule={self.schedule!r} must be Every(50), Budget(0.01) or a function of "
                "the step"
            )
        if not isinstance(self.source, NumberSource):
            try:
                for name in self.statistics:
                    find(name)
            except ValueError as error:  # which says what is near, or what the parameter may be
                raise ValueError(f"probe {self.name!r}: {error}") from error
        wrong = [name for name in self.statistics if not offers(self.source, name)]
        if wrong or not self.statistics:
            raise ValueError(
                f"probe {self.name!r} has unknown statistics {wrong}; {type(self.source).__name__} offers "
                f"{_offered(self.source)}"
            )


def due_at(probe: Probe) -> Schedule:
    """When a probe is due: its schedule, as a function of the step."""
    assert not isinstance(probe.schedule, int)  # it was made one when the probe was
    return probe.schedule


def refuse_namesakes(probes: Sequence[Probe]) -> None:
    """Refuse probes of one monitor with the same name.

    Raises:
        ValueError: There is no probe, or two of them have one name.
    """
    names = [probe.name for probe in probes]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a monitor needs at least one probe, and all probes must have different names, not {names}")


def offers(source: Source, name: str) -> bool:
    """Whether there is such a statistic of what the source reads."""
    if isinstance(source, NumberSource):
        return name in _offered(source)
    try:
        asked = find(name)
    except ValueError:
        return False
    if asked.partner == "weight":
        return isinstance(source, MatrixSource) and source.of_changes
    return asked.takes == (Spectrum,) or (source.of_parameters and Scaling not in asked.takes)


def _offered(source: Source) -> list[str]:
    if isinstance(source, NumberSource):
        return [quantity.name for quantity in source.quantities]
    return [name for name in available() if offers(source, name)]
