"""Faults as matrices, and a module that they happen to while it is trained."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tests.trainings import digits

FAULTY_STEPS = (2, 3)
SHAPE = (10, 12)
Seen = dict[int, NDArray[np.float64] | None]


def _with_entry(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda noise, other: noise.index_fill(0, torch.tensor(1), value)


# What takes the place of a matrix: made from noise of its shape, and from the memory of another parameter.
MATRICES: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "nan": _with_entry(float("nan")),
    "inf": _with_entry(float("-inf")),
    "zero": lambda noise, other: torch.zeros_like(noise),
    "none": lambda noise, other: None,
    "sparse": lambda noise, other: (noise * (noise > 0)).to_sparse(),
    "huge": lambda noise, other: noise / noise.abs().max() * 1e38,
    "denormal": lambda noise, other: noise / noise.abs().max() * 1e-42,
    "rank deficient": lambda noise, other: noise[:, :2] @ noise[:2],
    "non-contiguous": lambda noise, other: noise.repeat_interleave(3, 1).mT.contiguous().mT[:, ::3],
    "aliased": lambda noise, other: other[: noise.shape[0], : noise.shape[1]],
    "resized": lambda noise, other: noise[: len(noise) // 2],
    "resized to one row": lambda noise, other: noise[:1],
}
DELETED = {"deleted": "batch begins", "deleted in flight": "gradients final"}
FAULTS = (*MATRICES, *DELETED)

Moments = Iterator[str]  # a fault yields the moment at which it is to go on


class Layer(nn.Linear):
    """A layer that keeps what it put out, and may put out another thing than it computes."""

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool = True) -> None:
        super().__init__(num_inputs, num_outputs, bias=bias)
        self.emits: Callable[[], Tensor | None] | None = None
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        if self.weight is None or self.weight.is_sparse:  # which is part of no prediction
            output = x.new_zeros(len(x), SHAPE[0])
        else:
            output = linear(x, self.weight, self.bias) if self.emits is None else self.emits()
        self.last = None if output is None else output.detach().clone()
        return output


class Afflicted(L.LightningModule):
    """A classifier with a small layer per kind of thing that is read: the fault is there in steps 2 and 3, and mended
    once it was read.

    Args:
        fault: One of `FAULTS`, None for a sound run.
    """

    def __init__(self, fault: str | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(
            Layer(64, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.1), Layer(16, 10)
        )
        self.of = nn.ModuleDict({name: Layer(12, 10, bias=False) for name in AFFLICTIONS})
        nn.init.zeros_(self.of["displacement"].weight)
        self.fault, self.spy, self.losses = fault, Spy(self), []
        self._generator = torch.Generator().manual_seed(1)
        self._under_way: list[tuple[str, Moments]] = []

    def made(self) -> Tensor | None:
        """Another matrix of the faulty kind."""
        noise = torch.randn(SHAPE, generator=self._generator)
        return MATRICES[self.fault](noise, self.net[0].weight.detach())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._moment("batch begins")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.losses.append(loss.item())
        self.spy.outputs("feature", self.global_step)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))
        self.spy.outputs("validation_feature", len(self.losses) - 1)

    def on_after_backward(self) -> None:
        self._moment("gradients final")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.spy.before_step(self.global_step)
        self._moment("read")

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Called by the optimizer, before it calls those that came later."""
        self._moment("stepped")
        self.spy.after_step(len(self.losses) - 1, optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._moment("batch over")
        if self.fault is not None and self.global_step == FAULTY_STEPS[0]:
            self._under_way = [(next(moments), moments) for moments in self._begun(self.fault)]

    def configure_optimizers(self) -> Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        optimizer.register_step_post_hook(self.after_step)
        return optimizer

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(16), batch_size=16)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = self.net(batch[0])
        for layer in self.of.values():
            output = layer(batch[0][:, 20:32])
            if layer.emits is None:
                logits = logits + output
        return cross_entropy(logits, batch[1])

    def _begun(self, fault: str) -> list[Moments]:
        return (
            [_deleted(self, DELETED[fault])]
            if fault in DELETED
            else [afflict(self) for afflict in AFFLICTIONS.values()]
        )

    def _moment(self, name: str) -> None:
        """Every fault that waits for this moment goes on."""
        self._under_way = [(next(m, "never") if awaited == name else awaited, m) for awaited, m in self._under_way]


class Spy:
    """What was really there to be read: by quantity and site, at each step a matrix, None where there was none."""

    def __init__(self, module: Afflicted) -> None:
        self._module = [module]  # not a submodule
        self._names = [name for name, p in module.named_parameters() if p.ndim == 2]
        self._start = {name: module.get_parameter(name).detach().clone() for name in self._names}
        self._before: dict[str, Tensor] = {}
        self.seen: dict[tuple[str, str], Seen] = {}

    def outputs(self, quantity: str, step: int) -> None:
        """What the layers put out; None of one that did not run."""
        for name in self._names:
            layer = self._layer(name)
            output = None if layer is None or layer.last is None else layer.last.to_dense()
            self._note(quantity, name.removesuffix("weight") + "out", step, output)
            if layer is not None:
                layer.last = None

    def before_step(self, step: int) -> None:
        """Gradients and weights."""
        self._before = {}
        for name, parameter in self._parameters():
            gradient = None if parameter is None or parameter.grad is None else parameter.grad.to_dense()
            self._note("gradient", name, step, gradient)
            weight = None if parameter is None or parameter.is_sparse else parameter.detach()
            self._note("weight", name, step, weight if parameter is None else _dense(parameter))
            if weight is not None:
                self._before[name] = weight.clone()
                # A layer that was replaced by one of another size begins anew.
                self._start[name] = self._start[name] if self._start[name].shape == weight.shape else weight.clone()
            self._note("displacement", name, step, None if weight is None else weight - self._start[name])

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """What the step changed, and the optimizer's state."""
        for name, parameter in self._parameters():
            before = self._before.get(name)
            comparable = parameter is not None and before is not None and parameter.shape == before.shape
            unreadable = None if parameter is None or not parameter.is_sparse else _dense(parameter)
            self._note("update", name, step, parameter.detach() - before if comparable else unreadable)
            for key, quantity in (("exp_avg", "first_moment"), ("exp_avg_sq", "second_moment")):
                state = optimizer.state.get(parameter, {}).get(key) if parameter is not None else None
                known = state is not None and state.shape == parameter.shape
                self._note(quantity, name, step, _dense(state) if known else None)

    def _note(self, quantity: str, site: str, step: int, matrix: Tensor | None) -> None:
        self.seen.setdefault((quantity, site), {})[step] = (
            None if matrix is None else matrix.detach().double().numpy().copy()
        )

    def _layer(self, name: str) -> Layer | None:
        path, _, last = name.removesuffix(".weight").rpartition(".")
        return self._module[0].get_submodule(path)._modules.get(last)

    def _parameters(self) -> Iterable[tuple[str, nn.Parameter | None]]:
        """Those of now, under the names of the beginning."""
        for name in self._names:
            layer = self._layer(name)
            yield name, None if layer is None else layer.weight


def _dense(tensor: Tensor) -> Tensor:
    """What can be read of it: of a sparse tensor no number, although it is there."""
    return torch.full(tensor.shape, torch.nan) if tensor.is_sparse else tensor.detach()


def _gradient(module: Afflicted) -> Moments:
    parameter = module.of["gradient"].weight
    for _ in FAULTY_STEPS:
        yield "gradients final"
        data, gradient, fault = parameter.data, parameter.grad, module.made()
        parameter.grad = None
        if fault is not None and fault.shape != data.shape:  # a gradient has the shape of its parameter
            parameter.data = data[: len(fault)]
        parameter.grad = fault
        yield "read"
        parameter.grad = None
        parameter.data = data
        parameter.grad = gradient


def _weight(module: Afflicted, name: str = "weight") -> Moments:
    if module.fault in ("none", "sparse"):
        return _replaced(module, name)
    return _refilled(module, name)


def _refilled(module: Afflicted, name: str) -> Moments:
    """Another content."""
    parameter = module.of[name].weight
    for _ in FAULTY_STEPS:
        yield "gradients final"
        data, parameter.data = parameter.data, module.made()
        yield "read"
        parameter.data = data


def _replaced(module: Afflicted, name: str) -> Moments:
    """Another parameter or none, before the first faulty step begins."""
    layer = module.of[name]
    kept, fault = layer.weight, module.made()
    layer.weight = None if fault is None else nn.Parameter(fault)
    for _ in FAULTY_STEPS:
        yield "batch over"
    layer.weight = kept


def _update(module: Afflicted) -> Moments:
    if module.fault in ("none", "sparse"):
        return _replaced(module, "updated")
    return _moved(module)


def _moved(module: Afflicted) -> Moments:
    """The weight goes from zero to what is faulty, while the optimizer steps."""
    parameter = module.of["updated"].weight
    for _ in FAULTY_STEPS:
        yield "gradients final"
        data, parameter.data = parameter.data, torch.zeros(SHAPE)
        yield "stepped"
        parameter.data = module.made()
        yield "batch over"
        parameter.data = data


def _first_moment(module: Afflicted) -> Moments:
    parameter = module.of["first_moment"].weight
    for _ in FAULTY_STEPS:
        yield "stepped"
        state = module.optimizers().optimizer.state[parameter]
        kept, state["exp_avg"] = state["exp_avg"], module.made()
        yield "batch over"
        state["exp_avg"] = kept


def _feature(module: Afflicted) -> Moments:
    """Also in the validation between the two steps."""
    yield "batch begins"
    module.of["feature"].emits = module.made
    for _ in FAULTY_STEPS:
        yield "batch over"
    module.of["feature"].emits = None


def _deleted(module: Afflicted, moment: str) -> Moments:
    """All layers but those of the net are gone from module and optimizer."""
    yield moment
    optimizer = module.optimizers().optimizer
    layers, everything = dict(module.of), optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = list(module.net.parameters())
    module.of.clear()
    for _ in FAULTY_STEPS:
        yield "batch over"
    module.of.update(layers)
    optimizer.param_groups[0]["params"] = everything


# By the layer that each happens to; a ModuleDict has a method `update`.
AFFLICTIONS: dict[str, Callable[[Afflicted], Moments]] = {
    "gradient": _gradient,
    "weight": _weight,
    "displacement": lambda module: _weight(module, "displacement"),
    "updated": _update,
    "first_moment": _first_moment,
    "feature": _feature,
}
