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
    """Half the squared length of parameters, times the strength, to be added to a loss: what a gradient gets of it is
    `strength * W`.

    Raises:
        ValueError: There are no parameters, or names with them.

    Examples:
        >>> weight_decay([torch.ones(2, 2)], 0.5)
        tensor(1.)
    """
    several = list(parameters)
    if not several or not all(isinstance(parameter, Tensor) for parameter in several):
        found = [type(parameter).__name__ for parameter in several[:1]]
        raise ValueError(f"weight_decay of {found}: tensors, one at least; net.parameters() is empty after one use")
    return 0.5 * strength * torch.stack([parameter.square().sum() for parameter in several]).sum()


def input_noise(
    inputs: Float[Tensor, "*B"], deviation: float, *, generator: torch.Generator | None = None
) -> Float[Tensor, "*B"]:
    """Inputs with independent Gaussian noise on every entry.

    Args:
        inputs: Any.
        deviation: Standard deviation of the noise.
        generator: Of the noise; torch's own unless given.

    Raises:
        ValueError: The entries are no real numbers, or the deviation is negative or not finite.
    """
    if not inputs.is_floating_point() or not 0 <= deviation < inf:
        raise ValueError(
            f"input_noise of deviation {deviation!r} on {inputs.dtype}: from 0 on, and on floating point inputs alone"
        )
    return inputs + deviation * torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype, device=inputs.device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def jacobian_penalty(module: nn.Module, inputs: Tensor, match: str | Sequence[str] | None = None) -> Float[Tensor, ""]:
    """Half the mean over examples of the squared length of the outputs' Jacobian by the weights of linear layers.

    To be added to a loss in `training_step`, or measured. The module is run once more, in eval mode (no dropout,
    running statistics), uncompiled, and gone through backward once for every output; what other examples of the batch
    are does not count, nor do frozen weights. What the module draws at random in eval mode too is drawn without a
    trace. With non-reentrant activation checkpointing it can be measured, but not added where a checkpointed part has
    batch norm.

    Args:
        module: Called with the inputs alone.
        inputs: Examples along the first axis.
        match: Weights, as for monitors: of all linear layers unless given.

    Raises:
        ValueError: There is no trained weight of a linear layer among those that fit, or one is used without a graph
            (reentrant activation checkpointing); the module does not give one tensor, or a layer does not see one, with
            the examples along the first axis; or there are more than 256 outputs for each.

    Examples:
        >>> jacobian_penalty(nn.Linear(3, 1), torch.ones(5, 3))
        tensor(1.5000)
    """
    wanted = {id(p) for p in chosen_parameters(module, match, None).values() if p.requires_grad}
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) and id(m.weight) in wanted]
    if not layers:
        raise ValueError(
            f"jacobian_penalty: match={match!r} fits no weight of a linear layer of "
            f"{type(module).__name__} that is trained"
        )
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    # Until the last backward pass: activation checkpointing runs layers again in it.
    with differentiable_twice(module), unheard(), torch.random.fork_rng(devices), _in_eval_mode(module):
        with _heard(layers) as calls:
            outputs = module(inputs)
        rows, called = _rows(outputs, inputs), [output for _, _, output in calls]
        if not calls or not all(output.requires_grad for output in (rows, *called)):
            why = (
                "a layer runs without a graph; checkpoint with use_reentrant=False"
                if calls
                else "no such layer is called"
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
    """Logs the Jacobian penalty of every batch as `jacobian_penalty`, and adds it to the loss if it is asked to.

    It is added in place to the loss that Lightning is about to differentiate, so that accumulation, half precision and
    DDP treat it as a part of the loss; the loss that `training_step` logged is without it. So is what other callbacks
    see, before or after it in the list: it goes to the end of the Trainer's callbacks. `GradientAnatomyMonitor`
    hears the training's own pass alone: what a penalty that is added brings into a gradient is its `deviation`, and
    above 5 % of the gradient the shares are blank.

    A module that counts or averages in its `forward`, in eval mode too, does so once more at every batch. Where the
    penalty is only logged, what goes wrong is NaN and one warning; where it is to be added, a training without it would
    be another one, so that it ends with an error in its first batch.

    Args:
        strength: What the penalty is multiplied by.
        add: Add it to the loss; else it is only logged, and training stays as it is.
        match: Weights, as for `jacobian_penalty`.
        inputs_of: `batch -> inputs`; the batch, or the first of a tuple or list, unless given.

    Raises:
        ValueError: The strength is no finite number. When training starts: the module has no `forward`, or it optimises
            by hand and the penalty is to be added. In the first batch, if it is to be added: inputs are no tensor, or
            what `jacobian_penalty` refuses.

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
            raise ValueError(f"JacobianPenalty(strength={strength!r}): a finite number")
        self.strength, self.add, self.match, self.inputs_of = strength, add, match, inputs_of or _first
        self._batch: Any = None
        self._is_told = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what it cannot know: how to run the module, and which of several losses to add to; come last."""
        if self.add and not pl_module.automatic_optimization:
            raise ValueError(
                "JacobianPenalty(add=True): the module optimises by hand; call jacobian_penalty in its training_step"
            )
        if type(pl_module).forward is L.LightningModule.forward:
            raise ValueError(
                f"JacobianPenalty runs the module on the inputs alone: give {type(pl_module).__name__} a forward"
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
        """Let go of the batch."""
        self._batch = None

    def _measured(self, module: L.LightningModule) -> Float[Tensor, ""]:
        """The penalty of the batch; NaN where it cannot be had and is not to be added."""
        try:
            inputs = self.inputs_of(self._batch)
            if not isinstance(inputs, Tensor):
                raise ValueError(
                    f"JacobianPenalty: inputs are a {type(inputs).__name__} and no tensor; say where they are "
                    "by inputs_of="
                )
            penalty: Tensor = jacobian_penalty(module, inputs, self.match)
            return penalty
        except Exception as error:  # to watch must not end a run
            if self.add:
                raise
            if not self._is_told:
                rank_zero_warn(f"lightning_lowrank: no Jacobian penalty is logged ({type(error).__name__}): {error}")
            self._is_told = True
            return torch.full((), torch.nan, device=module.device)


def _rows(outputs: Any, inputs: Tensor) -> Float[Tensor, "B C"]:
    """What the module gave, a row for each example."""
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != len(inputs) or outputs.numel() == 0:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"jacobian_penalty: the module gave {found} of {len(inputs)} examples; wrap it to give one "
            "tensor, by example"
        )
    rows = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
    if rows.shape[1] > MOST_OUTPUTS:
        raise ValueError(
            f"jacobian_penalty: {rows.shape[1]} outputs of each example take as many backward passes; "
            f"{MOST_OUTPUTS} at most"
        )
    return rows


def _by_example(rows: Tensor, num_examples: int) -> Float[Tensor, "B T _"]:
    """Rows of a layer, those of an example together."""
    if rows.ndim < 2 or len(rows) != num_examples:
        raise ValueError(
            f"jacobian_penalty: a layer sees shape {tuple(rows.shape)} of {num_examples} examples: they belong first"
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
