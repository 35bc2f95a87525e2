"""How far the classes of a batch are apart after each block, and neural collapse before the classifier."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_lowrank.distributed.shards import unspent, whole
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.class_separation import (
    ClassSums,
    angle_deviation,
    lidar,
    norm_variation,
    self_duality,
    variability_collapse,
)
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.measuring.sources.features import Features, rows_of
from lightning_lowrank.models.blocks import blocks
from lightning_lowrank.models.names import tags
from lightning_lowrank.models.taps import Listener, refuse_fast_path
from lightning_lowrank.models.training import Training

Labels = Callable[[Any], Tensor]
# Where a batch that is a mapping has its labels.
KEYS = ("labels", "label", "targets", "target", "y")
NO_LABELS = "the second part of the batch has no whole number for each example; give a function labels=batch -> labels"


class Classes(NumberSource):
    """Separation of the classes of a training batch: LiDAR of each block, neural collapse before the classifier.

    The features of an example are averaged over its positions.

    Args:
        classifier: Name of the linear layer that computes the logits of the classes.
        match: Layers, as of `Representations`.
        exclude: Patterns of what to leave out, as for `match`.
        max_width: Outputs wider than this are left out.
        labels: `batch -> labels`.

    Raises:
        ValueError: In `plan`: the classifier is not a linear layer of the module or is parametrised, a pattern matches
            nothing, or a layer cannot be measured.
    """

    name = "representation_classes"
    level = "functions"
    quantities = (
        Quantity("representation_lidar", "directions", per_site=True),
        Quantity("representation_lidar_shuffled", "directions", per_site=True, detail="all"),
        *(Quantity(f"representation_{name}") for name in ("nc1", "nc2_norms", "nc2_angles", "nc3")),
        *(Quantity(f"representation_{name}", detail="all") for name in ("nc1_shuffled", "class_rows", "classes")),
    )

    def __init__(
        self,
        classifier: str,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        max_width: int = 2048,
        labels: Labels | None = None,
    ) -> None:
        self._classifier, self._match, self._max_width = classifier, match, max_width
        self._read = labels or labels_of
        # Which layers there are; it never listens.
        self._features = Features(exclude=exclude, max_width=max_width)
        self._outputs, self._inputs = Listener(self._leaves), Listener(self._enters, before=True)
        self._head: nn.Linear | None = None
        self._around: dict[str, nn.Module] = {}
        self._labels: tuple[Tensor, Tensor] | None = None
        # The classifier's, before the step.
        self._weight: Tensor | None = None
        self._sums: dict[str, tuple[ClassSums, ClassSums]] = {}

    def plan(self, training: Training) -> None:
        """Choose the layers."""
        layers = dict(training.module.named_modules())
        head = layers.get(self._classifier)
        if not isinstance(head, nn.Linear):
            linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
            raise ValueError(
                f"classifier={self._classifier!r} is not a linear layer of the module; its linear layers are "
                f"{linear[-10:]}"
            )
        if is_parametrized(head, "weight"):
            raise ValueError(
                f"classifier={self._classifier!r} has a parametrised weight, which may change when it is read, so "
                "it is not measured"
            )
        found = [f"re:^{re.escape(name)}$" for name in blocks(training.module)]
        self._features.match = self._match if self._match is not None else found or None
        self._features.plan(training)
        names = tags(name for name in layers if name)
        by_tag = {tag: name for name, tag in names.items()}
        heard = {label.removesuffix(".out"): label for label in self._features.labels()}
        outputs = {label: layers[by_tag[tag]] for tag, label in heard.items() if layers[by_tag[tag]] is not head}
        refuse_fast_path(training.module, self._classifier, "features")
        self._around = {label: layers[by_tag[tag].rpartition(".")[0]] for tag, label in heard.items()}
        self._outputs.plan(training.module, outputs, "features")
        self._inputs.plan(training.module, {f"{names[self._classifier]}.in": head}, "features")
        self._head = head

    def labels(self) -> list[str]:
        """The layers, the input of the classifier, and the whole model."""
        return [*self._outputs.layers, *self._inputs.layers, WHOLE_MODEL]

    def batch_begins(self, batch: Batch) -> None:
        """Start listening, with the labels of this batch and the same in another order."""
        labels = self._read(batch.data)
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(NO_LABELS)
        rng = torch.Generator(labels.device).manual_seed(batch.seed + batch.index)
        order = torch.randperm(len(labels), generator=rng, device=labels.device)
        self._labels = (labels, labels[order])
        self._outputs.attach(self.timed)
        self._inputs.attach(self.timed)

    def batch_over(self) -> None:
        """Stop listening."""
        for listener in (self._outputs, self._inputs):
            listener.detach()
            self.trouble = listener.take_error() or self.trouble
        self._labels = None

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers over all examples of the step, of all processes."""
        heard = team.all_gather_object({name: tuple(pair[0].sums.shape) for name, pair in self._sums.items()})
        names = [name for name in self.labels() if all(one.get(name) == heard[0].get(name, ()) for one in heard)]
        pooled = {name: _pooled(self._sums[name], team) for name in names}
        last = next(iter(self._inputs.layers))
        found = [Numbers(name, _apart(*pooled[name])) for name in names]
        weight = self._weight
        self.detach()
        if last in pooled and weight is not None:
            found.append(Numbers(WHOLE_MODEL, _collapse(*pooled[last], weight)))
        return found

    def detach(self) -> None:
        """Stop listening, and drop the unfinished sample."""
        self._outputs.detach()
        self._inputs.detach()
        self._sums, self._labels, self._weight = {}, None, None

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_head": None, "_around": {}, "_labels": None, "_weight": None, "_sums": {}}

    def _leaves(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        rows = rows_of(layer, output, self._around[name])
        if rows is not None:
            self._add(name, rows)

    def _enters(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        assert self._head is not None
        self._add(name, whole(unspent(inputs[0].detach())))
        if self._weight is None:
            self._weight = whole(self._head.weight.detach()).clone()

    def _add(self, name: str, rows: Tensor) -> None:
        assert self._head is not None and self._labels is not None
        if rows.shape[-1] > self._max_width:
            return
        if len(rows) != len(self._labels[0]):
            raise ValueError(f"{len(rows)} examples at {name!r} have {len(self._labels[0])} labels")
        examples = rows.to(working_dtype(rows.device)).reshape(len(rows), -1, rows.shape[-1]).mean(1)
        pair = tuple(_sums_of(examples, labels, self._head.out_features) for labels in self._labels)
        before = self._sums.get(name)
        self._sums[name] = (
            (pair[0], pair[1]) if before is None else (_both(before[0], pair[0]), _both(before[1], pair[1]))
        )


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch as loaders give them; None where there are none."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in KEYS if key in batch), None)
    else:
        found = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) else None


def _sums_of(examples: Tensor, labels: Tensor, num_classes: int) -> ClassSums:
    """Of a batch; a label that is no class, as -100, takes its example out."""
    known = (labels >= 0) & (labels < num_classes)
    places = torch.nn.functional.one_hot(torch.where(known, labels, 0).long(), num_classes)
    member = places.to(examples) * known[:, None]
    counted = examples * known[:, None]
    return ClassSums(counted.mT @ counted, member.mT @ examples, member.sum(0))


def _both(one: ClassSums, other: ClassSums) -> ClassSums:
    return ClassSums(one.gram + other.gram, one.sums + other.sums, one.counts + other.counts)


def _pooled(pair: tuple[ClassSums, ClassSums], team: Team) -> tuple[ClassSums, ClassSums]:
    """Of all processes together."""
    real, shuffled = pair
    gram, sums, counts, others = (
        team.all_reduce(part.clone() if team.sees_data else torch.zeros_like(part))
        for part in (real.gram, real.sums, real.counts, shuffled.sums)
    )
    return ClassSums(gram, sums, counts), ClassSums(gram, others, counts)


def _apart(real: ClassSums, shuffled: ClassSums) -> dict[str, Tensor]:
    return {"representation_lidar": lidar(real), "representation_lidar_shuffled": lidar(shuffled)}


def _collapse(real: ClassSums, shuffled: ClassSums, weight: Tensor) -> dict[str, Tensor]:
    """Of what comes into the classifier."""
    found = {
        "nc1": variability_collapse(real),
        "nc1_shuffled": variability_collapse(shuffled),
        "nc2_norms": norm_variation(real),
        "nc2_angles": angle_deviation(real),
        "nc3": self_duality(real, weight.to(real.sums)),
        "class_rows": real.counts.sum() / real.num_classes,
        "classes": real.num_classes,
    }
    return {f"representation_{name}": value for name, value in found.items()}
