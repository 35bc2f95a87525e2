"""How large the steps of each parameter group are, and how many weights they move."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lowrank.distributed.shards import is_sharded, local
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.measuring.number_source import Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.parameter_source import difference
from lightning_lowrank.measuring.source import Step
from lightning_lowrank.measuring.sources.updates import master_of
from lightning_lowrank.models.training import Training


class UpdateSizes(NumberSource):
    """Root mean squares of updates and weights for each parameter group: the update, the weights before it, their
    ratio, and the share of weights that one step does not change.

    For weights in half precision, it reads the optimizer's copy in float32 if there is one, like `Updates`. The share
    that does not change is that of the stored weights. Sites are `group_0`, `optimizer_1.group_0` for several
    optimizers, or the name of a group. It keeps a copy of all weights from before each due step until after it.

    Examples:
        >>> [quantity.name for quantity in UpdateSizes().quantities][:2]
        ['update_size_ratio', 'update_size_rms']
    """

    name = "update_size"
    quantities = (
        Quantity("update_size_ratio", per_site=True, detail="core"),
        Quantity("update_size_rms", "entries", per_site=True),
        Quantity("update_size_weight_rms", "entries", per_site=True),
        Quantity("update_size_unchanged_share", per_site=True, detail="core"),
    )

    def __init__(self) -> None:
        self._labels: dict[tuple[int, int], str] = {}
        self._before: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
        # Of each group the energies of update and weights, entries, and entries that have not moved.
        self._sums: dict[str, Tensor] = {}
        self._device, self._size = torch.device("cpu"), 1

    def plan(self, training: Training) -> None:
        """Name the groups."""
        self._labels = {}
        self._device, self._size = training.device, training.team.size
        for i, optimizer in enumerate(training.optimizers):
            prefix = f"optimizer_{i}." if len(training.optimizers) > 1 else ""
            for j, group in enumerate(optimizer.param_groups):
                named = group.get("name")
                label = named if isinstance(named, str) and named not in self._labels.values() else f"group_{j}"
                self._labels[id(optimizer), j] = prefix + label

    def labels(self) -> Sequence[str]:
        """One per group."""
        return list(self._labels.values())

    def gradients_final(self, step: Step) -> list[Any]:
        """Keep the weights."""
        self._before = [
            (label, p, local(p).clone(), None if own is None else local(own).clone())
            for label, p in self._parameters(step.optimizer)
            for own in [_own(p, step.optimizer)]
        ]
        return []

    def step_done(self, step: Step) -> list[Any]:
        """Compare them."""
        before, self._before = self._before, []
        for label, parameter, stored, master in before:
            now, own = local(parameter), _own(parameter, step.optimizer)
            moved = difference(now, stored)
            update = moved if master is None or own is None else difference(local(own), master)
            sums = torch.stack([_energy(update), _energy(stored), *_counts(moved)]).to(self._device)
            # What every process has whole counts once.
            weighed = sums if is_sharded(parameter) else sums / self._size
            self._sums[label] = self._sums[label] + weighed if label in self._sums else weighed
        return []

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of all processes together."""
        labels = list(self._labels.values())
        nothing = torch.zeros(4, dtype=working_dtype(self._device), device=self._device)
        sums = team.all_reduce(torch.stack([self._sums.get(label, nothing) for label in labels]))
        stepped = set(self._sums)
        self.detach()
        # What was not stepped is not there: optimizers step on all processes alike.
        return [
            Numbers(label, _sizes(*row.unbind()))
            for label, row in zip(labels, sums.unbind(), strict=True)
            if label in stepped
        ]

    def detach(self) -> None:
        """Drop the copy."""
        self._before, self._sums = [], {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_labels": {}, "_before": [], "_sums": {}}

    def _parameters(self, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
        """What an optimizer steps, with the group; sparse and complex ones are left out."""
        return [
            (self._labels[id(optimizer), j], p)
            for j, group in enumerate(optimizer.param_groups)
            if (id(optimizer), j) in self._labels
            for p in group["params"]
            if p.requires_grad and not is_lazy(p) and p.is_floating_point() and p.layout == torch.strided
        ]


def _own(parameter: Tensor, optimizer: Optimizer) -> Tensor | None:
    """The copy in float32 that the optimizer keeps of a parameter in half precision, None without."""
    own = master_of(parameter, optimizer.state.get(parameter, {}))
    return None if own is None or own.dtype == parameter.dtype else own


def _energy(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=working_dtype(tensor.device))
    return norm.square()


def _counts(moved: Tensor) -> tuple[Tensor, Tensor]:
    """Entries, and those that have not moved."""
    dtype = working_dtype(moved.device)
    return torch.full((), moved.numel(), dtype=dtype, device=moved.device), (moved == 0).to(dtype).sum()


def _sizes(update: Tensor, weight: Tensor, count: Tensor, unchanged: Tensor) -> dict[str, Tensor]:
    """The ratio is NaN where all weights are 0."""
    return {
        "update_size_ratio": torch.where(weight == 0, torch.nan, (update / weight).sqrt()),
        "update_size_rms": (update / count).sqrt(),
        "update_size_weight_rms": (weight / count).sqrt(),
        "update_size_unchanged_share": unchanged / count,
    }
