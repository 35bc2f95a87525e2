"""Three regularisers that move the components of a gradient: weight decay, input noise, and a penalty on the Jacobian.

Shape letters:  B examples   N inputs of a layer   M its outputs   C outputs of the model
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lowrank.loss.replay import differentiable_twice
from lightning_lowrank.models.names import chosen_parameters
from lightning_lowrank.models.taps import unheard
from lightning_lowrank.watching.trainer import TrainerTraining

# Outputs of one example: each takes a backward pass.
MOST_OUTPUTS = 256


def weight_decay(parameters: Iterable[Tensor], strength: float) -> Float[Tensor, ""]:
    """Half the squared norm of parameters times the strength, as a term to add to a loss. It adds `strength * W` to the
    gradient.

    Raises:
        ValueError: There are no parameters, or they come with names.

    Examples:
        >>> weight_decay([torch.ones(2, 2)], 0.5)
        tensor(1.)
    """
    several = list(parameters)
    if not several or not all(isinstance(parameter, Tensor) for parameter in several):
        found = [type(parameter).__name__ for parameter in several[:1]]
        raise ValueError(
            f"weight_decay of {found}: expected at least one tensor. An iterator such as net.parameters() is "
            "empty after one use"
        )
    return 0.5 * strength * torch.stack([parameter.square().sum() for parameter in several]).sum()


def input_noise(
    inputs: Float[Tensor, "*B"], deviation: float, *, generator: torch.Generator | None = None
) -> Float[Tensor, "*B"]:
    """Inputs with independent Gaussian noise on every entry.

    Args:
        inputs: Any tensor of floating point numbers.
        deviation: Standard deviation of the noise.
        generator: Generator of the noise. Default: torch's global one.

    Raises:
        ValueError: The inputs are not floating point numbers, or the deviation is negative or not finite.
    """
    if not inputs.is_floating_point() or not 0 <= deviation < inf:
        raise ValueError(
            f"input_noise of deviation {deviation!r} on {inputs.dtype}: the deviation must be at least 0, and the "
            "inputs floating point numbers"
        )
    return inputs + deviation * torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype, device=inputs.device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def jacobian_penalty(module: nn.Module, inputs: Tensor, match: str | Sequence[str] | None = None) -> Float[Tensor, ""]:
    """Half the mean over examples of the squared norm of the outputs' Jacobian with respect to the weights of linear
    layers.

    Add it to a loss in `training_step`, or measure it. The module runs once more, uncompiled and in eval mode (no
    dropout, running statistics), with one backward pass for every output. Other examples of the batch and frozen
    weights have no influence. Random numbers that the module draws in eval mode leave no trace. With non-reentrant
    activation checkpointing it can be measured. It can be added only if no checkpointed part has batch norm.

    Args:
        module: Module that is called with the inputs only.
        inputs: Examples along the first axis.
        match: Patterns of weights, as for monitors. Default: all weights of linear layers.

    Raises:
        ValueError: No trained weight of a linear layer matches, or one is used without a graph (reentrant activation
            checkpointing). The module must return one tensor with the examples along the first axis, and each layer
            must get such a tensor. An example must have at most 256 outputs.

    Examples:
        >>> jacobian_penalty(nn.Linear(3, 1), torch.ones(5, 3))
        tensor(1.5000)
    """
    wanted = {id(p) for p in chosen_parameters(module, match, None).values() if p.requires_grad}
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) and id(m.weight) in wanted]
    if not layers:
        raise ValueError(
            f"jacobian_penalty: match={match!r} matches no trained weight of a linear layer of {type(module).__name__}"
        )
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    # Until the last backward pass: activation checkpointing runs layers again in it.
    with differentiable_twice(module), unheard(), torch.random.fork_rng(devices), _in_eval_mode(module):
        with _heard(layers) as calls:
            outputs = module(inputs)
        rows, called = _rows(outputs, inputs), [output for _, _, output in calls]
        if not calls or not all(output.requires_grad for output in (rows, *called)):
            why = (
                "a layer runs without a graph; use activation checkpointing with use_reentrant=False"
                if calls
                else "none of these layers is called"
            )
            raise ValueError(f"jacobian_penalty: in the forward of {type(module).__name__} {why}")
        total: Tensor = rows.new_zeros(())
        for column in rows.unbind(1):
            signals = torch.autograd.grad(column.sum(), called, create_graph=True, materialize_grads=True)
            by_weight: dict[int, list[tuple[Tensor, Tensor]]] = {}
            for (weight, rows_in, _), signal in zip(calls, signals, strict=True):
                by_weight.setdefault(weight, []).append(
                    (_by_example(rows_in, len(inputs)), _by_example(signal, len(inputs)))
                )
            total = total + torch.stack([_squared(sides) for sides in by_weight.values()]).sum()
        return 0.5 / len(inputs) * total


class JacobianPenalty(L.Callback):
    """Log the Jacobian penalty of every batch as `jacobian_penalty`, and add it to the loss on request.

    It is added in place to the loss that Lightning is about to differentiate, so gradient accumulation, half precision
    and DDP treat it as part of the loss. The loss that `training_step` logged, and the loss that other callbacks see,
    do not contain it, wherever they are in the list. The callback moves itself to the end of the Trainer's callbacks.
    `GradientAnatomyMonitor` sees only the training's own pass: an added penalty appears in its `deviation`, and above 5
    % of the gradient its shares are blank.

    If a module counts or averages in its `forward` in eval mode, too, it does so once more for every batch. If the
    penalty is only logged, a failure gives NaN and one warning. If it should be added, a failure raises an error in the
    first batch, since the training would otherwise be another one.

    Args:
        strength: Factor of the penalty.
        add: Add it to the loss. Otherwise it is only logged, and training does not change.
        match: Patterns of weights, as for `jacobian_penalty`.
        inputs_of: Maps a batch to the inputs. Default: the batch, or the first element of a tuple or list.

    Raises:
        ValueError: The strength is not a finite number. When training starts: the module has no `forward`, or the
            penalty should be added under manual optimization. In the first batch, if it should be added: the inputs are
            no tensor, or `jacobian_penalty` raises an error.

    Examples:
        >>> JacobianPenalty(1e-3, add=True).add
        True
    """

    def __init__(
        self,
        strength: float,
        *,
        add: bool = False,
        match: str | Sequence[str] | None = None,
        inputs_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not isinstance(strength, int | float) or not isfinite(strength):
            raise ValueError(f"JacobianPenalty(strength={strength!r}): the strength must be a finite number")
        self.strength, self.add, self.match, self.inputs_of = strength, add, match, inputs_of or _first
        self._batch: Any = None
        self._is_told = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse modules without a forward, and manual optimization if the penalty is added; move to the end of the
        callbacks.
        """
        if self.add and not pl_module.automatic_optimization:
            raise ValueError(
                "JacobianPenalty(add=True): the module uses manual optimization; call jacobian_penalty in its "
                "training_step"
            )
        if type(pl_module).forward is L.LightningModule.forward:
            raise ValueError(
                f"JacobianPenalty calls the module with the inputs only; define forward in {type(pl_module).__name__}"
            )
        if self.add:  # a new list: the Trainer is going through the old one
            untyped: Any = trainer  # whose callbacks Lightning declares nowhere
            untyped.callbacks = [*(other for other in untyped.callbacks if other is not self), self]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Measure, and add."""
        penalty = self._measured(pl_module)
        pl_module.log("jacobian_penalty", penalty.detach())
        if self.add:
            loss.add_((self.strength * TrainerTraining(trainer, pl_module).loss_scale() * penalty).to(loss.dtype))

    def on_train_batch_end(self, *_: Any) -> None:
        """Forget the batch."""
        self._batch = None

    def _measured(self, module: L.LightningModule) -> Float[Tensor, ""]:
        """The penalty of the batch; NaN where it cannot be had and is not to be added."""
        try:
            inputs = self.inputs_of(self._batch)
            if not isinstance(inputs, Tensor):
                raise ValueError(
                    f"JacobianPenalty: the inputs are a {type(inputs).__name__}, not a tensor; select them with "
                    "inputs_of="
                )
            penalty: Tensor = jacobian_penalty(module, inputs, self.match)
            return penalty
        except Exception as error:  # to watch must not end a run
            if self.add:
                raise
            if not self._is_told:
                rank_zero_warn(
                    f"lightning_lowrank: the Jacobian penalty could not be computed ({type(error).__name__}): {error}"
                )
            self._is_told = True
            return torch.full((), torch.nan, device=module.device)


def _rows(outputs: Any, inputs: Tensor) -> Float[Tensor, "B C"]:
    """What the module gave, a row for each example."""
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != len(inputs) or outputs.numel() == 0:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"jacobian_penalty: the module returned {found} for {len(inputs)} examples; wrap it to return one "
            "tensor with the examples first"
        )
    rows = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
    if rows.shape[1] > MOST_OUTPUTS:
        raise ValueError(
            f"jacobian_penalty: {rows.shape[1]} outputs of each example need as many backward passes; the limit is "
            f"{MOST_OUTPUTS}"
        )
    return rows


def _by_example(rows: Tensor, num_examples: int) -> Float[Tensor, "B T _"]:
    """Rows of a layer, those of an example together."""
    if rows.ndim < 2 or len(rows) != num_examples:
        raise ValueError(
            f"jacobian_penalty: a layer gets shape {tuple(rows.shape)} for {num_examples} examples, which must be "
            "the first axis"
        )
    return rows.flatten(1, -2) if rows.ndim > 2 else rows[:, None]


def _squared(sides: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, ""]:
    """Sum over examples of the squared length of the gradient of one output by a weight, from the two sides of all
    calls.
    """
    inputs, signals = (torch.cat(parts, 1) for parts in zip(*sides, strict=True))
    if inputs.shape[1] == 1:
        return (inputs.square().sum(-1) * signals.square().sum(-1)).sum()
    return (signals.mT @ inputs).square().sum()


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


@contextmanager
def _heard(layers: Sequence[nn.Module]) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """Of all calls which weight, inputs and outputs."""
    calls: list[tuple[int, Tensor, Tensor]] = []

    def hear(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        calls.append((id(layer.weight), inputs[0] if inputs else named["input"], output))

    hooks = [layer.register_forward_hook(hear, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
