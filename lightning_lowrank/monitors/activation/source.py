"""Numbers of blocks, of their branches and of their weights."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.activations import (
    channel_kurtosis,
    dormant_share,
    massive_count,
    massive_ratio,
    row_uniformity,
)
from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype
from lightning_lowrank.maths.spectra.subspaces import top_subspace
from lightning_lowrank.measuring.gathering import Gathered, gather
from lightning_lowrank.measuring.number_source import Numbers, NumberSource, Quantity, led_by
from lightning_lowrank.measuring.parameter_source import weights
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.measuring.sources.features import LAYERS
from lightning_lowrank.measuring.sources.weights import Weights
from lightning_lowrank.models.axes import is_transposed
from lightning_lowrank.models.blocks import blocks
from lightning_lowrank.models.names import fitting, tags
from lightning_lowrank.models.sites import Site
from lightning_lowrank.models.training import Training
from lightning_lowrank.models.units import is_projection
from lightning_lowrank.monitors.activation.streams import Flow, Streams

CORE = ("activation_rms", "activation_growth", "activation_massive_ratio", "activation_gradient_gain")
LOOKED_UP = ("_chance", "_defect")
UNITS = {"massive_count": "channels"}
OF_BLOCKS = (
    *("rms", "growth", "depth_growth", "write_ratio", "write_defect", "gradient_gain"),
    *("massive_ratio", "massive_count", "kurtosis", "dormant_share", "alignment", "alignment_chance"),
)
NAMES = (*OF_BLOCKS, "branch_ratio", "row_uniformity", "row_uniformity_chance")


class Activations(NumberSource):
    """Sizes of activations and gradients between blocks, and measures of the weights inside.

    Args:
        match: Blocks: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`. By default the entries of lists of
            layers of one class; if there are none, linear, convolutional, embedding, attention and recurrent layers.
        exclude: Patterns of what to leave out, as for `match`.
        max_width: Longest short side of weights whose singular vectors are used; 0 for none.

    Raises:
        ValueError: `max_width` is below 0; in `plan`: a pattern matches nothing, there is no block, or a layer cannot
            be measured.
    """

    name = "activation"
    level = "functions"

    def __init__(
        self,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        max_width: int = 2048,
    ) -> None:
        if type(max_width) is not int or max_width < 0:
            raise ValueError(f"max_width={max_width!r} must be a number of columns, or 0 for no singular vectors")
        self._match, self._exclude, self._max_width = match, exclude, max_width
        quantities = (Quantity(f"activation_{name}", UNITS.get(name, "1"), per_site=True) for name in NAMES)
        self.quantities = led_by(CORE, quantities, LOOKED_UP)
        self._streams, self._weights = Streams(), Weights()
        # Of each block the one that it stands behind the first of, and its matrices.
        self._lists: dict[str, str] = {}
        self._inside: dict[str, list[Site]] = {}

    def plan(self, training: Training) -> None:
        """Choose the blocks."""
        layers = {name: layer for name, layer in training.module.named_modules() if name}
        names = tags(layers)
        wanted = self._chosen(training.module, layers)
        chosen = {name: names[name] for name in layers if name in wanted}
        branches = {
            f"{name}.{local}": name
            for name in chosen
            for local, part in layers[name].named_children()
            if _may_write(layers[name], local, part) and f"{name}.{local}" not in chosen
        }
        self._streams.plan(training.module, chosen, branches)
        self._lists = {tag: name.rpartition(".")[0] for name, tag in chosen.items()}
        self._weights.plan(training)
        inside = {tag: {id(p) for p in layers[name].parameters()} for name, tag in chosen.items()}
        self._inside = {
            tag: [site for site in self._weights.sites if id(site.parameters[0]) in ids] for tag, ids in inside.items()
        }

    def labels(self) -> list[str]:
        """Blocks, then their matrices."""
        return [*self._streams.blocks, *(label for site in self._matrices() for label in site.labels)]

    def batch_begins(self, batch: Batch) -> None:
        """Start listening."""
        self._streams.attach(self.timed)

    def batch_over(self) -> None:
        """Stop listening."""
        self.trouble = self._streams.batch_over() or self.trouble

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of blocks over all rows of the step and of all processes; of weights after the step."""
        flows = self._streams.pooled(team)
        self.detach()
        of_weights = self._of_weights(team)
        found = {name: _of_flow(flow) for name, flow in flows.items()}
        for name, values in found.items():
            first = next(flows[other] for other in flows if self._lists[other] == self._lists[name])
            values["depth_growth"] = values["rms"] / _rms(first.energies["entering"], first.energies["num_entering"])
            for branch, energy in flows[name].branches.items():
                of_weights[branch] = {"branch_ratio": (energy / flows[name].energies["entering"]).sqrt()}
        rows = {name: found.get(name, {}) | of_weights.get(name, {}) for name in [*found, *of_weights]}
        return [Numbers(name, {f"activation_{key}": x for key, x in row.items()}) for name, row in rows.items()]

    def detach(self) -> None:
        """Stop listening, and drop the unfinished sample."""
        self._streams.detach()

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_inside": {}, "_weights": Weights()}

    def _chosen(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
        if self._match is not None:
            chosen = fitting("match", self._match, layers)
        else:
            # The projection of an attention is never called as a layer.
            inner = {id(layer.out_proj) for layer in layers.values() if isinstance(layer, nn.MultiheadAttention)}
            usual = {name for name, layer in layers.items() if isinstance(layer, LAYERS) or is_transposed(layer)}
            chosen = set(blocks(module)) or {name for name in usual if id(layers[name]) not in inner}
        chosen -= set() if self._exclude is None else fitting("exclude", self._exclude, layers)
        if not chosen:
            raise ValueError(
                "ActivationMonitor finds no block; match layers whose outputs should be read. Layers: "
                f"{list(layers)[:10]}"
            )
        return chosen

    def _matrices(self) -> list[Site]:
        """Each once, however many of the blocks it is in."""
        return list({id(site): site for inside in self._inside.values() for site in inside}.values())

    def _of_weights(self, team: Team) -> dict[str, dict[str, Tensor]]:
        """Of each matrix how uniform its rows are; of blocks how they are aligned with the next one.

        Who has a matrix whole tells the others: two that are to be compared may not be on one process.
        """
        readings = [weights(site) for site in self._matrices()]
        if not readings:
            return {}
        owners = team.assign([float(reading.shape.numel()) * min(reading.shape[-2:]) for reading in readings])
        rounds = gather(readings, owners, team, spectra_only=False, beside=False)
        mine = {label: matrix for taken in rounds for whole in taken for label, matrix in _matrices(whole)}
        pairs, device = list(self._pairs()), self._weights.sites[0].parameters[0].device
        widths = {label: reading.shape[-1] for reading in readings for label in reading.labels}
        nothing = torch.zeros((), dtype=working_dtype(device), device=device)
        told = [row_uniformity(mine[label]) if label in mine else nothing for label in widths]
        told += [nothing + (label in mine) for label in widths]
        sides = [
            _top_vectors(mine[label])[side] if label in mine else nothing.expand(width)
            for _, *both, width in pairs
            for side, label in enumerate(both)
        ]
        sizes = [len(told), *(side.numel() for side in sides)]
        known, *whole = team.all_reduce(torch.cat([torch.stack(told), *sides])).split(sizes)
        # Whose owner could not read it is blank.
        uniform, there = known.view(2, -1)
        uniform, there = uniform / there, dict(zip(widths, there / there, strict=True))
        of_matrices = {
            label: {"row_uniformity": value, "row_uniformity_chance": nothing + width / (width + 2)}
            for (label, width), value in zip(widths.items(), uniform.unbind(), strict=True)
        }
        return of_matrices | {
            block: {
                "alignment": (one @ other).abs() * there[last] * there[first],
                "alignment_chance": nothing + sqrt(2 / (pi * width)),
            }
            for (block, last, first, width), one, other in zip(pairs, whole[::2], whole[1::2], strict=True)
        }

    def _pairs(self) -> Iterator[tuple[str, str, str, int]]:
        """Neighbours in one list: the block, its last matrix, the first one of the next, and the width between."""
        for block, following in pairwise(self._inside):
            one, other = self._inside[block], self._inside[following]
            if not one or not other or self._lists[block] != self._lists[following]:
                continue
            last, first = one[-1].shape[-2:], other[0].shape[-2:]
            if last[0] == first[1] and max(min(last), min(first)) <= self._max_width:
                yield block, one[-1].labels[-1], other[0].labels[0], last[0]


def _matrices(whole: Gathered) -> Iterator[tuple[str, Tensor]]:
    """Single ones by label."""
    assert isinstance(whole.value, Tensor)
    value = whole.value.detach()
    yield from zip(whole.labels, value.reshape(-1, *value.shape[-2:]).to(working_dtype(value.device)), strict=True)


def _may_write(block: nn.Module, local: str, part: nn.Module) -> bool:
    """Whether a part of a block may add to the stream: one with matrices, where parts do not feed one another. Queries,
    keys and values that lie in the block itself go into its attention.
    """
    if isinstance(block, nn.Sequential) or (is_projection(local) and not any(part.children())):
        return False
    return any(parameter.ndim > 1 for parameter in part.parameters())


def _rms(energy: Tensor, count: Tensor) -> Tensor:
    return (energy / count).sqrt()


def _of_flow(flow: Flow) -> dict[str, Tensor]:
    sums = flow.energies
    rms = _rms(flow.squares.sum(), sums["rows"] * len(flow.squares))
    return {
        "rms": rms,
        "growth": rms / _rms(sums["entering"], sums["num_entering"]),
        "write_ratio": (sums["added"] / sums["entering"]).sqrt(),
        "write_defect": (sums["unexplained"] / sums["added"]).sqrt(),
        "gradient_gain": (sums["gradient_in"] / sums["gradient_out"]).sqrt(),
        "massive_ratio": massive_ratio(flow.tops),
        "massive_count": massive_count(flow.tops),
        "kurtosis": channel_kurtosis(flow.squares / sums["rows"]),
        "dormant_share": dormant_share(flow.magnitudes / sums["rows"]),
    }


def _top_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right vector of the largest singular value."""
    with full_precision(matrix.device):
        short = top_subspace(matrix, 1).basis[..., 0]
        wide = matrix.shape[0] <= matrix.shape[1]
        other = torch.nn.functional.normalize((matrix.mT if wide else matrix) @ short, dim=0)
        return (short, other) if wide else (other, short)
