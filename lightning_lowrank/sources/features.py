"""Features: what layers put out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.metrics import Gram
from lightning_lowrank.names import Place, clean, fitting
from lightning_lowrank.sources.source import Reading, Source

LAYERS = (nn.Linear, _ConvNd, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)


@dataclass(kw_only=True)
class Features(Source):
    """Outputs of layers, pooled over all rows of a due step: positions, micro-batches and processes.

    A row is a position of a sequence or of an image; its length is the last axis, for convolutions and other outputs of four axes or more the
    second. Of a layer that returns several things the first tensor is read. The number of rows is logged as `lowrank/<name>_rows`: with
    fewer rows than columns it caps every rank.

    Args:
        match: Layers to read: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`, one or several. Unless given all linear,
            convolutional, embedding, attention and recurrent layers.
        exclude: The same, taken away.
        centred: About the mean of all rows (a covariance, tags begin with `centred_feature`), or as they are (RankMe; tags begin with `feature`).
        stage: "train": the rows of a due step. "validation": those of a whole validation loop; tags begin with `validation_`.
        max_width: Wider outputs are left out: a Gram matrix of that side is kept in float64.

    Raises:
        ValueError: `stage` is another word; in `plan`, a pattern matches nothing or a layer is inside a compiled module, whose hooks never run.
    """

    match: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    centred: bool = False
    stage: Literal["train", "validation"] = "train"
    max_width: int = 2048

    def __post_init__(self) -> None:
        if self.stage not in ("train", "validation"):
            raise ValueError(f"Features(stage={self.stage!r}): it is 'train' or 'validation'")
        self.of_parameters = False
        self.name = ("validation_" if self.stage == "validation" else "") + ("centred_" if self.centred else "") + "feature"
        self._layers: dict[str, nn.Module] = {}
        self._grams: dict[str, Gram] = {}
        self._hooks: list[RemovableHandle] = []
        self._error: Exception | None = None

    def plan(self, module: nn.Module) -> None:
        """Choose the layers."""
        layers = {name: layer for name, layer in module.named_modules() if name}
        places = {name: Place((clean(name), name), layer) for name, layer in layers.items()}
        chosen = {n for n, m in layers.items() if isinstance(m, LAYERS)} if self.match is None else fitting("match", self.match, places)
        chosen -= set() if self.exclude is None else fitting("exclude", self.exclude, places)
        hidden = [name for name in layers if name in chosen and _compiled_around(name, module, layers)]
        if hidden:
            raise ValueError(f"features of {hidden[0]!r} cannot be read: hooks inside a compiled module never run; match layers outside of it")
        self._layers = {clean(name): layers[name] for name in layers if name in chosen}

    def labels(self) -> list[str]:
        """One per layer."""
        return [f"{name}.out" for name in self._layers]

    def facts(self) -> dict[str, float]:
        """Rows behind the latest sample, at the layer with the fewest."""
        return {"rows": float(min((g.num_rows for g in self._grams.values()), default=0))}

    def batch_begins(self, module: nn.Module) -> None:
        """Hook the layers for this batch."""
        if not self._hooks:
            self._hooks = [layer.register_forward_hook(partial(self._add, name)) for name, layer in self._layers.items()]

    def batch_over(self) -> None:
        """Take the hooks away, and own up to what went wrong in them."""
        self._unhook()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def sample_over(self) -> list[Reading]:
        """Spectra of the pooled rows."""
        grams, self._grams = self._grams, {}
        return [Reading((f"{name}.out",), gram.spectrum(centred=self.centred)) for name, gram in grams.items()]

    def detach(self) -> None:
        """Take the hooks away and forget the rows."""
        self._unhook()
        self._grams, self._error = {}, None

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _add(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        # Activation checkpointing runs the layer again during backward: those are the same rows.
        if torch._C._current_graph_task_id() != -1:
            return
        try:
            rows = _rows(layer, output)
            if rows is not None and rows.shape[-1] <= self.max_width:
                gram = self._grams.setdefault(name, Gram(rows.shape[-1]).to(rows.device))
                gram.update(rows)
        except Exception as error:  # this runs inside the user's forward
            self._error = error


def _rows(layer: nn.Module, output: Any) -> Tensor | None:
    """The output with its features last, None where it holds no real numbers."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        output = next((part for part in output if isinstance(part, Tensor)), None)
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
        return None
    return output.movedim(1, -1) if isinstance(layer, _ConvNd) or output.ndim > 3 else output


def _compiled_around(name: str, module: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Whether the layer runs inside a graph of torch.compile."""
    parts = name.split(".")
    around = [module, *(layers[".".join(parts[:i])] for i in range(1, len(parts)))]
    return any(getattr(m, "_compiler_ctx", None) or m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in around)
