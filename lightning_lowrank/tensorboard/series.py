"""Data for the tab from event files, read through TensorBoard's data provider with any loader.

Shape letters:  T samples   S sites   R numbers per site, where it is a spectrum or a curve
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.data.provider import RunTagFilter

from lightning_lowrank.tensorboard.event_files import EventFiles

PLUGIN = "lowrank"
KINDS = ("vector", "spectrum", "curve", "cost", "alert")

# "Every sample" where TensorBoard's data providers ask for a number of them.
ALL = 2**31 - 1

# A site that a sample was not to read, in the bits of a NaN; what was read and is no number has the bits of `np.nan`.
GAP = np.uint32(0x7FC00001)
NAN = np.uint32(0x7FC00000)


@dataclass(frozen=True)
class Segment:
    """A stretch of a series under one tag: its sites do not change.

    Attributes:
        tag: In the event files.
        known: What was written of it: kind, name, sites and more.
    """

    tag: str
    known: Mapping[str, Any]

    @property
    def sites(self) -> list[str]:
        """In the order of its vectors."""
        return list(self.known["sites"])

    def fits(self, array: NDArray[Any]) -> bool:
        """Whether a sample is as we write it: a number per site, of spectra and curves some."""
        whole = array.shape[:1] == (len(self.sites),) and array.ndim == (
            2 if self.known["kind"] in ("spectrum", "curve") else 1
        )
        return whole and array.dtype.kind in "fiu"


@dataclass(frozen=True)
class Table:
    """A series as a whole.

    Attributes:
        steps: Ascending, each once.
        sites: Of all parts, in the order in which they came.
        values: `[T, S]`, of spectra `[T, S, R]`.
    """

    steps: NDArray[np.int64]
    sites: list[str]
    values: NDArray[np.float32]

    def at(self, chosen: NDArray[np.int64]) -> "Table":
        """Some of the samples."""
        return Table(self.steps[chosen], self.sites, self.values[chosen])

    def of(self, site: str) -> "Table":
        """One of the sites.

        Raises:
            KeyError: There is none of that name.
        """
        if site not in self.sites:
            raise KeyError(f"there is no site {site!r}")
        i = self.sites.index(site)
        return Table(self.steps, [site], self.values[:, i : i + 1])


Runs = dict[str, dict[tuple[str, str], list[Segment]]]


class Reader:
    """All series of one experiment.

    Args:
        provider: TensorBoard's.
        context: Of the request.
        experiment: Its id.
        files: Where the provider reads, to tell what is damaged.
    """

    def __init__(self, provider: Any, context: Any, experiment: str, files: EventFiles) -> None:
        self._provider, self._files = provider, files
        self._where = {"ctx": context, "experiment_id": experiment}

    def started(self) -> list[str]:
        """All runs, ours or not, as TensorBoard orders them: by the time at which they began."""
        listed = self._provider.list_runs(**self._where)
        begins = {run.run_name: math.inf if run.start_time is None else run.start_time for run in listed}
        return sorted(begins, key=lambda run: (begins[run], run))

    def damage(self, run: str) -> list[str]:
        """A sentence for each event file of a run that cannot be read to its end."""
        return self._files.damage(run)

    def runs(self, only: str | None = None) -> Runs:
        """Run -> kind and name -> parts, of all runs or of one; what is not as we write it is left out."""
        asked = RunTagFilter(runs=None if only is None else [only])
        listed = self._provider.list_tensors(**self._where, plugin_name=PLUGIN, run_tag_filter=asked)
        runs: Runs = {}
        for run in sorted(listed):
            # RustBoard lists tags in an order of its own.
            for tag, series in sorted(listed[run].items(), key=lambda item: (item[1].max_step, item[0])):
                known = _known(series.plugin_content)
                if known is not None:
                    runs.setdefault(run, {}).setdefault((known["kind"], known["name"]), []).append(Segment(tag, known))
        return runs

    def parts(self, run: str, kind: str, name: str) -> list[Segment]:
        """The parts of one series.

        Raises:
            KeyError: There is none of that name.
        """
        found = self.runs(run).get(run, {}).get((kind, name))
        if found is None:
            raise KeyError(f"run {run!r} has no {kind} {name!r}")
        return found

    def table(self, run: str, parts: Iterable[Segment]) -> Table:
        """Parts as one series. Where a run began again at an earlier step, the later word holds."""
        parts = list(parts)
        sites = list(dict.fromkeys(site for part in parts for site in part.sites))
        found = self._read(run, PLUGIN, [part.tag for part in parts])
        samples = [
            (datum.wall_time, datum.step, part, datum.numpy)
            for part in parts
            for datum in _standing(found.get(part.tag, ()))
        ]
        samples = [sample for sample in samples if sample[2].fits(sample[3])]
        steps = np.array(sorted({step for _, step, _, _ in samples}), np.int64)
        widths = {array.shape[1:] for *_, array in samples} or {()}
        values = np.full((len(steps), len(sites), *max(widths)), GAP, np.uint32).view(np.float32)
        column = {site: i for i, site in enumerate(sites)}
        columns = {part.tag: np.array([column[site] for site in part.sites], np.int64) for part in parts}
        row = {int(step): i for i, step in enumerate(steps)}
        for _, step, part, array in sorted(samples, key=lambda sample: sample[0]):
            if array.shape[1:] == values.shape[2:]:
                values[row[step], columns[part.tag]] = _plain(array)
        return Table(steps, sites, values)

    def scalar(self, run: str, names: Sequence[str]) -> Table | None:
        """The first of some scalars that the user has logged, as a series of the whole model; None without any."""
        listed = self._provider.list_scalars(
            **self._where, plugin_name="scalars", run_tag_filter=RunTagFilter(runs=[run])
        ).get(run, {})
        tag = next((name for name in names if name in listed), None)
        if tag is None:
            return None
        asked = RunTagFilter(runs=[run], tags=[tag])
        read = self._provider.read_scalars(**self._where, plugin_name="scalars", downsample=ALL, run_tag_filter=asked)
        data = _standing(read[run][tag])
        steps = np.array([datum.step for datum in data], np.int64)
        return Table(steps, ["whole model"], np.array([[datum.value] for datum in data], np.float32))

    def last_step(self, run: str) -> int:
        """The last step of any scalar that a run has logged; -1 without any."""
        listed = self._provider.list_scalars(
            **self._where, plugin_name="scalars", run_tag_filter=RunTagFilter(runs=[run])
        )
        return max((series.max_step for series in listed.get(run, {}).values()), default=-1)

    def texts(self, run: str) -> list[str]:
        """The tables of alerts that monitors have written, each as it was last."""
        listed = self._provider.list_tensors(**self._where, plugin_name="text", run_tag_filter=RunTagFilter(runs=[run]))
        tags = [tag for tag in sorted(listed.get(run, {})) if tag.startswith("lowrank/") and "_alerts" in tag]
        found = self._read(run, "text", tags)
        return [_text(found[tag][-1].numpy) for tag in tags if found.get(tag)]

    def _read(self, run: str, plugin: str, tags: list[str]) -> Mapping[str, Any]:
        if not tags:
            return {}
        asked = RunTagFilter(runs=[run], tags=tags)
        found = self._provider.read_tensors(**self._where, plugin_name=plugin, downsample=ALL, run_tag_filter=asked)
        return dict(found.get(run, {}))


def thinned(
    steps: NDArray[np.int64], limit: int, first: int | None = None, last: int | None = None
) -> NDArray[np.int64]:
    """Which samples to show: all between two steps, or as many as allowed, evenly spread, the first and the last among
    them.
    """
    chosen = np.flatnonzero(
        (steps >= (steps.min(initial=0) if first is None else first)) & (steps <= (np.inf if last is None else last))
    )
    if len(chosen) <= limit:
        return chosen
    return chosen[np.unique(np.linspace(0, len(chosen) - 1, limit).round().astype(np.int64))]


def _standing(data: Iterable[Any]) -> list[Any]:
    """The data under a tag without those that a later one takes back, since a run began again at its step.

    RustBoard has already left them out; TensorBoard's own loader has all, in the order in which they were written.
    """
    found: list[Any] = []
    for datum in data:
        while found and found[-1].step >= datum.step:
            found.pop()
        found.append(datum)
    return found


def _plain(array: NDArray[Any]) -> NDArray[np.float32]:
    """In float32, with one NaN for all that there are, so that none is taken for a gap."""
    plain = array.astype(np.float32)
    plain.view(np.uint32)[np.isnan(plain)] = NAN
    return plain


def _known(content: bytes) -> dict[str, Any] | None:
    """What belongs to a tag, None where it was not written by us: anybody can write event files."""
    try:
        known = json.loads(content)
        # What cannot be sent on as JSON in UTF-8 would make every answer fail.
        json.dumps(known, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    if not isinstance(known, dict) or known.get("kind") not in KINDS or not isinstance(known.get("name"), str):
        return None
    sites = known.get("sites")
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites) or len(set(sites)) < len(sites):
        return None
    if "null" in known and not _numbers(known["null"]):
        return None
    if known["kind"] == "curve":
        return known if _numbers(known.get("axis")) else None
    return known if known["kind"] != "spectrum" or _has_shapes(known) else None


def _has_shapes(known: Mapping[str, Any]) -> bool:
    """Whether it can be told what noise would give."""
    shapes, places = known.get("shapes"), known.get("shape_of")
    if not isinstance(shapes, list) or not isinstance(places, list) or len(places) != len(known["sites"]):
        return False
    whole = all(
        isinstance(shape, dict) and _numbers(shape.get("ranks")) and _numbers(shape.get("null")) for shape in shapes
    )
    return whole and all(isinstance(place, int) and 0 <= place < len(shapes) for place in places)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def _text(array: NDArray[Any]) -> str:
    (first, *_) = array.reshape(-1).tolist() or [b""]
    return first.decode(errors="replace") if isinstance(first, bytes) else str(first)
