"""Everything measured, for the tab of TensorBoard: one vector per quantity and sample instead of one scalar per site."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray

from lightning_lowrank import sinks
from lightning_lowrank.order_statistics import of_noise, ranks

# The name under which the tab finds them; `lightning_lowrank.tensorboard` has it too, for neither imports the other.
PLUGIN = "lowrank"

# Samples from one spectrum to the next.
SPECTRUM_EVERY = 10


@dataclass(frozen=True)
class Row:
    """One number, or one spectrum, per site.

    Attributes:
        kind: "vector", "spectrum", "cost" or "alert".
        name: Of the quantity, of the source, or of who speaks.
        values: Site -> number(s), in the order in which they are shown.
        known: What else the tab shows of it.
    """

    kind: str
    name: str
    values: Mapping[str, float | NDArray[np.float64]]
    known: Mapping[str, Any] = field(default_factory=dict)


class Vectors:
    """Writes rows to the event files of PyTorch's TensorBoard writers; other loggers are left alone.

    Sites are written once per event file, with the first vector of a tag. TensorBoard reads what belongs to a tag from its first event only,
    so that the tag ends in a digest of it: where sites change, or an optimizer has some of them, the curve goes on under another tag.
    """

    def __init__(self) -> None:
        self._announced: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
        self._contents: dict[tuple[str, ...], tuple[str, bytes]] = {}
        self._samples: dict[str, int] = {}

    def write(self, loggers: Iterable[Logger], rows: Sequence[Row], step: int) -> list[Exception]:
        """Write a sample; what a logger raises is returned, not raised."""
        tagged = [(*self._content(row), row) for row in rows if row.values]
        due = [(tag, content, _packed(row)) for tag, content, row in tagged if self._is_due(tag, row)]

        def hand(experiment: Any) -> None:
            writer = experiment._get_file_writer()
            # tensorboardX has protocol buffers of its own, which do not mix.
            if type(writer).__module__.startswith("torch."):
                writer.add_summary(self._summary(writer, due), step)

        return sinks.tell_writers(loggers, "_get_file_writer", hand) if due else []

    def _is_due(self, tag: str, row: Row) -> bool:
        """Spectra of every tenth sample, all else of each."""
        sample = self._samples[tag] = self._samples.get(tag, -1) + 1
        return row.kind != "spectrum" or sample % SPECTRUM_EVERY == 0

    def _content(self, row: Row) -> tuple[str, bytes]:
        """The tag of a row, and what belongs to it; made once."""
        key = (row.kind, row.name, *row.values)
        if key not in self._contents:
            known = {"kind": row.kind, "name": row.name, "sites": list(row.values), **row.known}
            content = json.dumps(known, separators=(",", ":"), allow_nan=False).encode()
            digest = hashlib.sha256(content).hexdigest()[:8]
            self._contents[key] = f"{PLUGIN}_{row.kind}/{row.name}/{digest}", content
        return self._contents[key]

    def _summary(self, writer: Any, rows: Sequence[tuple[str, bytes, NDArray[np.float32]]]) -> Any:
        """One summary for all rows, with what belongs to a tag where this event file has not had it."""
        # Not at the top: without TensorBoard there is no such writer.
        from tensorboard.compat.proto.summary_pb2 import Summary

        announced = self._announced.setdefault(writer, set())
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


def spectra(name: str, values: Mapping[str, NDArray[np.float64]], shapes: Mapping[str, tuple[int, int]], known: Mapping[str, Any]) -> Row:
    """A row of order statistics, with the ranks that they belong to and what noise would give.

    Args:
        name: Of the source.
        values: Site -> Frobenius norm and singular values at `order_statistics.ranks`.
        shapes: Site -> rows and columns of its matrix.
    """
    distinct = sorted({shapes[site] for site in values})
    nulls = [{"shape": shape, "ranks": ranks(min(shape)), "null": [float(value) for value in of_noise(shape)]} for shape in distinct]
    for entry in nulls:
        entry["null"] = entry["null"][: len(entry["ranks"])]
    return Row("spectrum", name, values, {**known, "shape_of": [distinct.index(shapes[site]) for site in values], "shapes": nulls})


def _packed(row: Row) -> NDArray[np.float32]:
    """Values in the float32 that TensorBoard's own scalars have; beyond its range they are infinite."""
    with np.errstate(over="ignore"):
        return np.array(list(row.values.values()), dtype="<f4")
