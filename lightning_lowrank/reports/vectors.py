"""Every number for TensorBoard's tab: one vector per quantity and sample instead of one scalar per site."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from lightning_lowrank.maths.spectra.order_statistics import of_noise, ranks
from lightning_lowrank.measuring.number_source import Curve, NumberSource
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.source import MatrixSource, Source
from lightning_lowrank.reports.sentences import sentence
from lightning_lowrank.statistics import find
from lightning_lowrank.tensorboard.site import page

# The name under which the tab finds them; `lightning_lowrank.tensorboard` has it too, for neither imports the other.
PLUGIN = "lowrank"

# What the tab shows in the place of a site for numbers of the whole model.
MODEL = "whole model"

# Samples from one spectrum to the next.
SPECTRUM_EVERY = 10

# Tags that an event file has had, by its writer. Not of a monitor, which is copied and sent to other processes.
_ANNOUNCED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Row:
    """One number, one spectrum or one vector per site.

    Attributes:
        kind: "vector" (of sites), "spectrum", "curve" (a vector at each site), "cost" or "alert".
        name: Of the quantity, of the source, or of who speaks.
        values: Site -> number(s), in the order in which they are shown.
        known: What else the tab shows of it.
        shapes: Rows and columns of each matrix, of spectra and of statistics that have a null.
    """

    kind: str
    name: str
    values: Mapping[str, float | NDArray[np.float64]]
    known: Mapping[str, Any] = field(default_factory=dict)
    shapes: Sequence[tuple[int, int]] = ()


@runtime_checkable
class Measured(Protocol):
    """The source of the rows: a probe at work."""

    probe: Probe
    name: str

    @property
    def quantities(self) -> list[str]: ...

    @property
    def units(self) -> list[str]: ...

    @property
    def orders(self) -> str: ...

    @property
    def curves(self) -> list[Curve]: ...

    @property
    def sites(self) -> Sequence[str]: ...

    def shape(self, site: str) -> tuple[int, int] | None: ...


class Vectors:
    """Writes rows to the event files of PyTorch's TensorBoard writers; other loggers are ignored.

    Sites are written once per event file, with the first vector of a tag. TensorBoard reads the metadata of a tag only
    from its first event, so the tag ends in a digest of the sites. If the sites change, or if an optimizer has only
    some of them, the curve continues under another tag.
    """

    def __init__(self) -> None:
        self._contents: dict[tuple[object, ...], tuple[str, bytes]] = {}
        self._samples: dict[str, int] = {}

    def draw(self, rows: Sequence[Row], step: int) -> Callable[[Any], None]:
        """A function that writes a sample to a writer of PyTorch's TensorBoard, and ignores other loggers."""
        tagged = [(*self._content(row), row) for row in rows if row.values]
        due = [(tag, content, _packed(row)) for tag, content, row in tagged if self._is_due(tag, row)]

        def draw(experiment: Any) -> None:
            if due and callable(getattr(experiment, "_get_file_writer", None)):
                writer = experiment._get_file_writer()
                # tensorboardX has protocol buffers of its own, which do not mix.
                if type(writer).__module__.startswith("torch."):
                    writer.add_summary(self._summary(writer, due), step)

        return draw

    def _is_due(self, tag: str, row: Row) -> bool:
        """Spectra of every tenth sample, all else of each."""
        sample = self._samples[tag] = self._samples.get(tag, -1) + 1
        return row.kind != "spectrum" or sample % SPECTRUM_EVERY == 0

    def _content(self, row: Row) -> tuple[str, bytes]:
        """The tag of a row, and what belongs to it; made once."""
        # Features have as many rows as a batch: their null is that of the first, or each sample would begin a curve.
        key = (row.kind, row.name, *row.values, *(row.shapes if row.kind == "spectrum" else ()))
        if key not in self._contents:
            null = _noise(row.shapes) if row.kind == "spectrum" else _null(row)
            known = {"kind": row.kind, "name": row.name, "sites": list(row.values), **row.known, **null}
            content = json.dumps(known, separators=(",", ":"), allow_nan=False).encode()
            digest = hashlib.sha256(content).hexdigest()[:8]
            self._contents[key] = f"{PLUGIN}_{row.kind}/{row.name}/{digest}", content
        return self._contents[key]

    def _summary(self, writer: Any, rows: Sequence[tuple[str, bytes, NDArray[np.float32]]]) -> Any:
        """One summary for all rows, with what belongs to a tag where this event file has not had it."""
        # Not at the top: without TensorBoard there is no such writer.
        from tensorboard.compat.proto.summary_pb2 import Summary

        announced = _ANNOUNCED.setdefault(writer, set())
        summary = Summary()
        for tag, content, values in rows:
            value = summary.value.add(tag=tag)
            if tag not in announced:
                value.metadata.plugin_data.plugin_name, value.metadata.plugin_data.content = PLUGIN, content
                value.metadata.data_class = 2  # DATA_CLASS_TENSOR
                announced.add(tag)
            value.tensor.dtype = 1  # DT_FLOAT
            value.tensor.tensor_content = values.tobytes()
            for size in values.shape:
                value.tensor.tensor_shape.dim.add(size=size)
        return summary


def rows(
    label: str,
    recorders: Iterable[Measured],
    values: Mapping[str, Mapping[str, float]],
    host: Mapping[str, NDArray[np.float64]],
    costs: Mapping[str, float],
    alerts: Mapping[str, float],
) -> list[Row]:
    """All rows of a report.

    Args:
        label: Word for the monitor.
        values: Quantity -> site -> number.
        host: The report, in which the order statistics are.
        costs: The monitor's own cost and failure counts, by name.
        alerts: States of its alerts, by rule.
    """
    found = [row for recorder in recorders for row in _of_recorder(recorder, values, host)]
    return [*found, Row("cost", label, costs), Row("alert", label, alerts)]


def _of_recorder(
    recorder: Measured, values: Mapping[str, Mapping[str, float]], host: Mapping[str, NDArray[np.float64]]
) -> list[Row]:
    known = {"source": recorder.name, "level": recorder.probe.source.level}
    found, sites = [], list(recorder.sites)
    of_matrices = isinstance(recorder.probe.source, MatrixSource)
    for quantity, unit in zip(recorder.quantities, recorder.units, strict=True):
        for name in (quantity, f"{quantity}_error"):
            row = {site or MODEL: value for site, value in values.get(name, {}).items()}
            statistic = name.removeprefix(f"{recorder.name}_")
            says = _says(recorder.probe.source, name, statistic)
            compared = _shapes(recorder, row) if of_matrices and name == quantity else ()
            more = {"statistic": statistic, "unit": unit, "says": says}
            found.append(Row("vector", name, row, {**known, **more}, compared))
    if recorder.orders in host:
        shapes = {
            site: shape for site in sites if site in found[0].values and (shape := recorder.shape(site)) is not None
        }
        read = {site: host[recorder.orders][:, i] for i, site in enumerate(sites) if site in shapes}
        found.append(Row("spectrum", recorder.name, read, known, [shapes[site] for site in read]))
    for curve in recorder.curves:
        there = {site or MODEL: host[curve.name][:, i] for i, site in enumerate(sites) if curve.name in host}
        read = {site: row for site, row in there.items() if site in found[0].values}
        found.append(Row("curve", curve.name, read, {**known, "axis": curve.axis}))
    return found


def _shapes(recorder: Measured, sites: Iterable[str]) -> Sequence[tuple[int, int]]:
    """Those of the matrices at all sites; none where one is not known."""
    shapes = [recorder.shape(site) for site in sites]
    return [shape for shape in shapes if shape is not None] if None not in shapes else ()


def _null(row: Row) -> dict[str, Any]:
    """What a Gaussian matrix of each site's shape gives, where the statistic compares with it."""
    if not row.shapes:
        return {}
    nulls = [find(str(row.known["statistic"])).null(shape) for shape in row.shapes]
    return {"null": [float(f"{value:.4g}") for value in nulls]} if all(map(math.isfinite, nulls)) else {}


def _says(source: Source, name: str, statistic: str) -> str:
    """One sentence of what a quantity is, and where it is explained."""
    if isinstance(source, MatrixSource):
        where = page("monitors/rank")
        return "" if statistic.endswith("_error") else f"{find(statistic).says} When it misleads: {where}"
    names = tuple(quantity.name for quantity in source.quantities) if isinstance(source, NumberSource) else ()
    return _says_of(name, names, type(source).__module__)


@lru_cache(4096)  # every sample asks
def _says_of(name: str, names: Sequence[str], module: str) -> str:
    _, _, feature = module.partition("lightning_lowrank.monitors.")
    where = page(f"monitors/{feature.split('.')[0].replace('_', '-')}")
    # Without the prefix that the user gave the monitor.
    own = max((own for own in names if f"_{name}".endswith(f"_{own}")), key=len, default=name)
    return " ".join(filter(None, [sentence(own), f"More: {where}" if feature else ""]))


def _noise(shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """For each distinct shape the ranks of the values that are kept, and what a Gaussian matrix of norm 1 has there."""
    if not shapes:
        return {}
    distinct = sorted(set(shapes))
    known: list[dict[str, Any]] = [{"shape": shape, "ranks": ranks(min(shape))} for shape in distinct]
    for entry, shape in zip(known, distinct, strict=True):
        # Made on the CPU: numpy may look at it where it is, which is no wait for the device.
        entry["null"] = [float(value) for value in np.from_dlpack(of_noise(shape))[: len(ranks(min(shape)))]]
    return {"shape_of": [distinct.index(shape) for shape in shapes], "shapes": known}


def _packed(row: Row) -> NDArray[np.float32]:
    """Values in the float32 that TensorBoard's own scalars have; beyond its range they are infinite."""
    with np.errstate(over="ignore"):
        return np.array(list(row.values.values()), dtype="<f4")
