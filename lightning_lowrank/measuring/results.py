"""Numbers of a sample in the making, per site, here and over all processes.

Shape letters:  Q statistics   all: these, whether the matrix was lost, and order statistics   n matrices measured at
once   S sites
                K values kept
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.decompose import SKETCH_ABOVE
from lightning_lowrank.maths.spectra.spectrum import Spectrum, working_dtype
from lightning_lowrank.maths.spectra.subspaces import Subspace
from lightning_lowrank.measuring.metrics import SiteMeans

# Directions compared by statistics of subspaces.
SUBSPACE_RANK = 8

SPECTRUM, BASIS, VALUES, LAST = "spectrum", "basis", "values", "last spectrum"


@dataclass(frozen=True)
class Staged:
    """Numbers that count once the optimizer has really stepped.

    Attributes:
        labels: Of the matrices.
        values: The statistics, whether the matrix was lost, and its order statistics where they are kept.
        errors: Of estimates.
        kept: What else is kept of each matrix: by kind, one tensor per matrix.
    """

    labels: Sequence[str]
    values: Float[Tensor, "all n"]
    errors: Float[Tensor, "Q n"] | None
    kept: Mapping[str, Sequence[Tensor]]


class Results:
    """Results of a sample so far: means of the statistics, their errors, and spectra and subspaces on request.

    Args:
        num_statistics: Q.
        spectra: Singular values are kept, for histograms.
        subspaces: Top subspaces are kept, for the next sample.
        lasting: Singular values are kept, for the next sample.
        num_orders: Order statistics that are kept.
    """

    def __init__(
        self, num_statistics: int, *, spectra: bool, subspaces: bool, lasting: bool = False, num_orders: int = 0
    ) -> None:
        self.columns: dict[str, int] = {}
        self.estimated = False
        self._num_statistics, self._num_orders = num_statistics, num_orders
        self._kinds = (SPECTRUM,) * spectra + (BASIS, VALUES) * subspaces + (LAST,) * lasting
        self._shapes: dict[str, tuple[int, int]] = {}
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._previous: dict[tuple[str, str], Tensor] = {}
        self.means, self.errors = self._metrics()

    def shape(self, label: str) -> tuple[int, int] | None:
        """Rows and columns of a matrix, as it was last; None where it was never read."""
        return self._shapes.get(label)

    def know(self, shapes: Mapping[str, tuple[int, int]], labels: Iterable[str] = ()) -> None:
        """Matrices that may be measured, the same on every process; those that were known once stay known.

        Args:
            shapes: Rows and columns.
            labels: More, of which the shape is not known yet.
        """
        for label in (*shapes, *labels):
            self.columns.setdefault(label, len(self.columns))
        self._shapes |= shapes
        self.estimated |= any(min(shape) > SKETCH_ABOVE for shape in shapes.values())

    def add(self, staged: Staged) -> None:
        """Let numbers count."""
        self._make_room(staged.values.device)
        columns = [self.columns[label] for label in staged.labels]
        self.means.update(staged.values, columns)
        if staged.errors is not None:
            self.errors.update(staged.errors, columns)
        for kind, rows in staged.kept.items():
            self._kept |= {(kind, label): row for label, row in zip(staged.labels, rows, strict=True)}

    def packed(self, device: torch.device) -> Float[Tensor, " _"]:
        """All of it as one vector, of the same length on every process, to be added up; NaN where there is no memory
        for it.
        """
        with suppress(Exception):
            self._make_room(device)
            kept = [_sized(self._kept.get(key), size, self.means.total) for key, size in self._sizes()]
            return torch.cat([tensor.flatten() for tensor in (*self._sums(), *kept)])
        rows = (
            (2 * self._num_statistics + 3 if self.estimated else self._num_statistics + 2) + self._num_orders
        ) * len(self.columns)
        return torch.full(
            (rows + sum(size.numel() for _, size in self._sizes()),),
            torch.nan,
            dtype=working_dtype(device),
            device=device,
        )

    def unpack(self, vector: Float[Tensor, " _"]) -> None:
        """Take the sum over all processes in the place of what was found here."""
        sums, sizes = self._sums(), dict(self._sizes())
        parts = vector.split([*(tensor.numel() for tensor in sums), *(size.numel() for size in sizes.values())])
        for own, whole in zip(sums, parts, strict=False):
            own.copy_(whole.view(own.shape))
        for (key, size), part in zip(sizes.items(), parts[len(sums) :], strict=True):
            read = self.means.count[self.columns[key[1]]] > 0
            before = self._previous.get(key, torch.full_like(part, torch.nan))
            before = before if before.shape == size else torch.full_like(part, torch.nan)
            self._kept[key] = torch.where(read, part.view(size), before.to(part).view(size))

    def take(self) -> tuple[Float[Tensor, "all S"], Float[Tensor, "Q S"], dict[str, Tensor]]:
        """Means, errors and spectra by label, NaN where nothing was measured; then start afresh."""
        self._make_room(self.means.total.device)
        means, errors = (metric.total / metric.count for metric in (self.means, self.errors))
        spectra = {label: row for (kind, label), row in self._kept.items() if kind == SPECTRUM}
        self._previous |= {key: tensor for key, tensor in self._kept.items() if key[0] != SPECTRUM}
        self.drop()
        return means, errors, spectra

    def drop(self) -> None:
        """Forget what was found in this sample."""
        self._kept = {}
        self.means.reset()
        self.errors.reset()

    def before(self, labels: Sequence[str], now: Subspace) -> Subspace:
        """The subspaces of the last sample; NaN where there was none of that shape."""
        return Subspace(self._stacked(BASIS, labels, now.basis), self._stacked(VALUES, labels, now.values))

    def spectrum_before(self, labels: Sequence[str], now: Spectrum) -> Spectrum:
        """The spectra of the last sample; NaN where there was none of as many values."""
        return replace(now, values=self._stacked(LAST, labels, now.values))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The last sample's subspaces and spectra."""
        return {
            kind: {label: tensor for (of, label), tensor in self._previous.items() if of == kind}
            for kind in (BASIS, VALUES, LAST)
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load them."""
        self._previous = {(kind, label): tensor for kind, known in state.items() for label, tensor in known.items()}

    def _stacked(self, kind: str, labels: Sequence[str], now: Tensor) -> Tensor:
        nothing = torch.full_like(now[0], torch.nan)
        known = [self._previous.get((kind, label), nothing) for label in labels]
        return torch.stack([tensor.to(now) if tensor.shape == nothing.shape else nothing for tensor in known])

    def _sizes(self) -> Iterator[tuple[tuple[str, str], torch.Size]]:
        """What is kept of each matrix that may be measured."""
        for label, shape in self._shapes.items():
            short = max(1, min(shape))
            few = min(short, SUBSPACE_RANK)
            whole = (0,) if short > SKETCH_ABOVE else (short,)
            sizes = {SPECTRUM: whole, LAST: whole, BASIS: (short, few), VALUES: (few,)}
            yield from (((kind, label), torch.Size(sizes[kind])) for kind in self._kinds)

    def _sums(self) -> list[Tensor]:
        """What adds up over processes."""
        metrics = (self.means, self.errors) if self.estimated else (self.means,)
        return [tensor for metric in metrics for tensor in (metric.total, metric.count)]

    def _metrics(self) -> tuple[SiteMeans, SiteMeans]:
        """Means of the statistics and of whether a site was lost; means of the errors."""
        num_rows, num_errors, num_sites = (
            self._num_statistics + 1 + self._num_orders,
            self._num_statistics,
            len(self.columns),
        )
        # They are added up with everything else of a report, in one collective.
        return SiteMeans(num_rows, num_sites, sync_on_compute=False), SiteMeans(
            num_errors, num_sites, sync_on_compute=False
        )

    def _make_room(self, device: torch.device) -> None:
        """Metrics as wide as the known sites, with what the narrower ones had."""
        narrow = self.means, self.errors
        if self.means.total.shape[1] != len(self.columns) or self.means.total.device != device:
            with device:  # made there: a copy from the host would wait
                self.means, self.errors = self._metrics()
            for old, new in zip(narrow, (self.means, self.errors), strict=True):
                if not old.update_called:
                    continue
                new.total[:, : old.total.shape[1]] += old.total.to(new.total)
                new.count[: old.count.shape[0]] += old.count.to(new.count)


def _sized(tensor: Tensor | None, size: torch.Size, sums: Tensor) -> Tensor:
    """What this process has of it: zeros where another one measures it, NaN where it is not what it should be."""
    if tensor is None:
        return sums.new_zeros(size)
    return tensor.to(sums) if tensor.shape == size and not tensor.is_complex() else sums.new_full(size, torch.nan)
