"""Features: what layers put out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_lowrank.distributed.shards import unspent, whole
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.metrics import add_rows, spectrum_of_rows, state_dtype
from lightning_lowrank.measuring.source import Batch, MatrixSource, Reading
from lightning_lowrank.models.axes import feature_axis, is_transposed, width
from lightning_lowrank.models.names import fitting, tags
from lightning_lowrank.models.taps import Listener, refuse_fast_path
from lightning_lowrank.models.training import Training, device_of

LAYERS = (nn.Linear, _ConvNd, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)


@dataclass(kw_only=True)
class Features(MatrixSource):
    """Outputs of layers, pooled over all rows of a due step: positions, micro-batches and processes.

    A row is a position of a sequence or of an image. Its entries are along the feature axis of the layer's type
    (`models/axes.py`): the channels of a convolution, the last axis of a linear layer. If a layer returns several
    objects, the first tensor is read. The number of rows is logged as `lowrank/<name>_rows`; with fewer rows than
    columns it limits every rank. A layer whose output changes its width or cannot be read has no number. With several
    processes each sample costs one exchange of row counts, which waits for the device.

    Args:
        match: Layers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`, one or several. By default all linear,
            convolutional, embedding, attention and recurrent layers, and transformers' `Conv1D`.
        exclude: Patterns of what to leave out, as for `match`.
        centred: Whether to subtract the mean of all rows (a covariance; tags begin with `centred_feature`); otherwise
            rows are used as they are (RankMe; `feature`).
        stage: "train": the rows of a due step. "validation": those of a whole validation loop; tags begin with
            `validation_`.
        max_width: Wider outputs are left out, since a Gram matrix of this side is kept in float64.

    Raises:
        ValueError: `stage` is unknown; in `plan`, a pattern matches nothing or a layer is inside a compiled module.
    """

    match: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    centred: bool = False
    stage: Literal["train", "validation"] = "train"
    max_width: int = 2048

    def __post_init__(self) -> None:
        if self.stage not in ("train", "validation"):
            raise ValueError(f"Features(stage={self.stage!r}): stage must be 'train' or 'validation'")
        self.of_parameters = False
        self.level = "functions"
        self.name = (
            ("validation_" if self.stage == "validation" else "") + ("centred_" if self.centred else "") + "feature"
        )
        self._listener = Listener(self._add)
        self._around: dict[str, nn.Module] = {}
        self._grams: dict[str, Tensor] = {}
        self._device = torch.device("cpu")
        # Width and number of rows by layer: of the sample being taken here, and of the last one in all processes.
        self._seen: dict[str, tuple[int, int]] = {}
        self._pooled: dict[str, tuple[int, int]] = {}

    def plan(self, training: Training) -> None:
        """Choose the layers."""
        self._device = device_of(training.module)
        layers = {name: layer for name, layer in training.module.named_modules() if name}
        # The projection of an attention is never called as a layer.
        inner = {id(layer.out_proj) for layer in layers.values() if isinstance(layer, nn.MultiheadAttention)}
        layers = {name: layer for name, layer in layers.items() if id(layer) not in inner}
        chosen = self._default(layers) if self.match is None else fitting("match", self.match, layers)
        chosen -= set() if self.exclude is None else fitting("exclude", self.exclude, layers)
        for name in sorted(chosen):
            refuse_fast_path(training.module, name, "features", evaluates=self.stage == "validation")
        names = tags(layers)
        heard = {names[name]: layer for name, layer in layers.items() if name in chosen}
        self._around = {names[name]: layers.get(name.rpartition(".")[0], training.module) for name in chosen}
        self._listener.plan(training.module, heard, "features")

    def labels(self) -> list[str]:
        """One per layer."""
        return [f"{name}.out" for name in self._listener.layers]

    def facts(self) -> dict[str, float]:
        """Number of rows in the latest sample, at the layer with the fewest."""
        return {"rows": float(min((num_rows for _, num_rows in self._pooled.values()), default=0))}

    def batch_begins(self, batch: Batch) -> None:
        """Listen to the layers during this batch."""
        self._listener.attach(self.timed)

    def batch_over(self) -> None:
        """Stop listening, and report failures."""
        self._listener.detach()
        if (error := self._listener.take_error()) is not None:
            raise error

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the last sample, of all processes together."""
        return {f"{name}.out": (num_rows, width) for name, (width, num_rows) in self._pooled.items()}

    def sample_over(self, team: Team) -> list[Reading]:
        """Spectra of the pooled rows."""
        grams, self._grams = self._grams, {}
        if not team.sees_data:
            grams, self._seen = {}, {}
        self._pooled, self._seen = _agreed(team.all_gather_object(self._seen)), {}
        return [
            Reading(
                (f"{name}.out",),
                torch.Size((num_rows, width)),
                [team.summand(grams[name] if name in grams else _no_rows(width, self._device))],
                partial(spectrum_of_rows, num_rows=num_rows, centred=self.centred),
            )
            for name, (width, num_rows) in self._pooled.items()
        ]

    def detach(self) -> None:
        """Stop listening and drop the rows."""
        self._listener.detach()
        self._listener.take_error()
        self._grams, self._seen = {}, {}

    def _default(self, layers: Mapping[str, nn.Module]) -> set[str]:
        """Layers of the usual types, less the too wide."""
        usual = {name: layer for name, layer in layers.items() if isinstance(layer, LAYERS) or is_transposed(layer)}
        return {name for name, layer in usual.items() if width(layer) <= self.max_width}

    def _add(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        try:
            rows = rows_of(layer, output, self._around[name])
            if rows is not None and rows.shape[-1] <= self.max_width:
                self._pool(name, rows)
        except Exception:
            self._seen[name] = (0, 0)
            self._grams.pop(name, None)
            raise

    def _pool(self, name: str, rows: Tensor) -> None:
        """Add rows to the layer's; a width of 0 stands for one that cannot be had."""
        width, before = self._seen.get(name, (rows.shape[-1], 0))
        if rows.shape[-1] != width:
            raise ValueError(f"the output of {name!r} changed its width to {rows.shape[-1]}")
        if name not in self._grams:
            self._grams[name] = _no_rows(width, rows.device)
        add_rows(self._grams[name], rows)
        self._seen[name] = (width, before + rows.numel() // width)


def _no_rows(width: int, device: torch.device) -> Tensor:
    """Gram matrix and sum of no rows; where only other processes came by a layer, they take part in the sum.

    Not a metric: torchmetrics keeps a second copy of each state, and refers to itself, so that both would stay until
    garbage is collected.
    """
    return torch.zeros(width + 1, width, dtype=state_dtype(), device=device)


def _agreed(parts: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Widths and numbers of rows of all processes together, in one order: of the layers that every process that came by
    can read.
    """
    found = {
        name: [part[name] for part in parts if name in part]
        for name in sorted({name for part in parts for name in part})
    }
    whole = {
        name: entries for name, entries in found.items() if len({width for width, _ in entries}) == 1 and entries[0][0]
    }
    return {name: (entries[0][0], sum(rows for _, rows in entries)) for name, entries in whole.items()}


def rows_of(layer: nn.Module, output: Any, around: nn.Module) -> Tensor | None:
    """The output with its features last, None where it holds no real numbers."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        output = next((part for part in output if isinstance(part, Tensor)), None)
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
        return None
    rows = whole(unspent(output.detach()))
    return rows.movedim(feature_axis(layer, rows.shape, around), -1)
