"""A network with its data and a measure, from the user's function for a command."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowrank.analysis.architectures import called, imported
from lightning_lowrank.models.checkpoints import Checkpoint

Measure = Callable[[nn.Module, Any], Mapping[str, Tensor]]

EXPECTED = (
    "(module, data, measure): the network, {name: batches}, and measure(module, batch) -> {name: mean over the batch}, "
    'among them "loss"'
)


@dataclass(frozen=True)
class Task:
    """A network with its data and its measure.

    Attributes:
        module: The architecture; its weights do not matter.
        data: Name -> batches, which can be iterated several times. A batch is a tensor of inputs, or a list or tuple
            that begins with one.
        measure: `(module, batch) -> {name: mean over the batch}`; smaller is better for "loss", larger for everything
            else.
    """

    module: nn.Module
    data: Mapping[str, Iterable[Any]]
    measure: Measure

    def state(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Weights and buffers of a checkpoint, by the module's names. Missing buffers come from the module.

        Raises:
            ValueError: A parameter is missing, has another shape, or is not finite.
        """
        own = self.module.state_dict()
        there = {n: next((o for o in (n, *self._tied.get(n, ())) if o in checkpoint.shapes), n) for n in own}
        needed = dict(self.module.named_parameters(remove_duplicate=False))
        wrong = [n for n, o in there.items() if o in checkpoint.shapes and checkpoint.shapes[o] != own[n].shape]
        missing = [n for n, o in there.items() if n in needed and o not in checkpoint.shapes]
        if wrong or missing:
            raise ValueError(
                f"{checkpoint.path} does not fit this network: it lacks {missing[:5]} and has other shapes for "
                f"{wrong[:5]}"
            )
        checkpoint.refuse_infinite(o for o in there.values() if o in checkpoint.shapes)
        return {
            n: checkpoint.tensor(o).to(own[n].dtype) if o in checkpoint.shapes else own[n] for n, o in there.items()
        }

    def untied(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state with each tied weight under one name, as `torch.func.functional_call` takes it."""
        twice = {other for several in self._tied.values() for other in several[1:]}
        return {name: tensor for name, tensor in state.items() if name not in twice}

    def whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state with tied weights under each of their names again."""
        others = {name: state[several[0]].clone() for name, several in self._tied.items() if name not in state}
        return {**state, **others}

    @cached_property
    def _tied(self) -> dict[str, list[str]]:
        """By name of a parameter that has several all of its names, the first one first."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return {name: several for several in names.values() if len(several) > 1 for name in several}


def task_of(place: str) -> Task:
    """The task that `module:function` returns.

    Raises:
        ValueError: There is no such function, it takes arguments, raises, or returns something else.
    """
    given = called(place, imported(place))
    if not (isinstance(given, tuple) and len(given) == 3):
        raise ValueError(f"{place} returned a {type(given).__name__}; expected {EXPECTED}")
    module, data, measure = given
    if not (isinstance(module, nn.Module) and isinstance(data, Mapping) and data and callable(measure)):
        kinds = ", ".join(type(one).__name__ for one in given)
        raise ValueError(f"{place} returned ({kinds}); expected {EXPECTED}")
    return Task(module, data, measure)


def inputs(batch: Any) -> Tensor:
    """The inputs of the network in a batch.

    Raises:
        ValueError: The batch does not begin with a tensor.
    """
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(first, Tensor):
        raise ValueError(
            f"a batch is a {type(batch).__name__}; expected a tensor of inputs, or a list that begins with one"
        )
    return first


def measured(measure: Measure, module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    """The measures of a batch.

    Raises:
        ValueError: The measure returns no mapping.
    """
    found = measure(module, batch)
    if not isinstance(found, Mapping):
        raise ValueError(f"the measure returned a {type(found).__name__}; expected {EXPECTED}")
    return found


@torch.no_grad()
def means(module: nn.Module, data: Mapping[str, Iterable[Any]], measure: Measure) -> dict[str, float]:
    """The measures in evaluation mode, as means over the examples of each data set: "test/loss" and so on.

    Raises:
        ValueError: A data set has no examples, or the measure returns no mapping.
    """
    module.eval()
    found: dict[str, float] = {}
    for name, batches in data.items():
        totals: dict[str, float] = {}
        count = 0
        for batch in batches:
            size = len(inputs(batch))
            for key, value in measured(measure, module, batch).items():
                totals[key] = totals.get(key, 0.0) + size * float(value)
            count += size
        if not count:
            raise ValueError(f"the data set {name!r} has no examples; give batches that can be iterated more than once")
        found |= {f"{name}/{key}": total / count for key, total in totals.items()}
    return found
