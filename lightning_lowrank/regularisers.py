"""Three regularisers that move the components of a gradient: weight decay, input noise, and a penalty on the Jacobian.

Shape letters:  B examples   N inputs of a layer   M its outputs   C outputs of the model
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lowrank import trainers
from lightning_lowrank.names import chosen_parameters
from lightning_lowrank.sources.features import unheard

# Outputs of one example: each takes a backward pass.
MOST_OUTPUTS = 256


def weight_decay(parameters: Iterable[Tensor], strength: float) -> Float[Tensor, ""]:
    """Half the squared length of parameters, times the strength, to be added to a loss: what a gradient gets of it is `strength * W`.

    Example:
        >>> weight_decay([torch.ones(2, 2)], 0.5)
        tensor(1.)
    """
    return 0.5 * strength * torch.stack([parameter.square().sum() for parameter in parameters]).sum()


def input_noise(inputs: Float[Tensor, "*B"], deviation: float, *, generator: torch.Generator | None = None) -> Float[Tensor, "*B"]:
    """Inputs with independent Gaussian noise on every entry.

    Args:
        inputs: Any.
        deviation: Standard deviation of the noise.
        generator: Of the noise; torch's own unless given.
    """
    return inputs + deviation * torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype, device=inputs.device)


def jacobian_penalty(module: nn.Module, inputs: Tensor, match: str | Sequence[str] | None = None) -> Float[Tensor, ""]:
    """Half the mean over examples of the squared length of the outputs' Jacobian by the weights of linear layers.

    To be added to a loss in `training_step`, or measured. The module is run once more, in eval mode (no dropout, running statistics), and
    gone through backward once for every output; what other examples of the batch are does not count.

    Args:
        module: Called with the inputs alone.
        inputs: Examples along the first axis.
        match: Weights, as for monitors: of all linear layers unless given.

    Raises:
        ValueError: There is no weight of a linear layer among those that fit, or an example has more than 256 outputs.

    Example:
        >>> jacobian_penalty(nn.Linear(3, 1), torch.ones(5, 3))
        tensor(1.5000)
    """
    wanted = {id(p) for p in chosen_parameters(module, match, None).values()}
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) and id(m.weight) in wanted]
    if not layers:
        raise ValueError(f"jacobian_penalty: match={match!r} fits no weight of a linear layer of {type(module).__name__}")
    with unheard(), _heard(layers) as calls, _in_eval_mode(module):
        outputs = module(inputs)
    rows = outputs.reshape(len(inputs), -1)
    if rows.shape[1] > MOST_OUTPUTS:
        raise ValueError(f"jacobian_penalty: {rows.shape[1]} outputs of each example take as many backward passes; {MOST_OUTPUTS} at most")
    total: Tensor = rows.new_zeros(())
    for column in rows.unbind(1):
        signals = torch.autograd.grad(column.sum(), [output for _, output in calls], create_graph=True, allow_unused=True)
        for (rows_in, _), signal in zip(calls, signals, strict=True):
            total = total if signal is None else total + _squared(rows_in, signal)
    return 0.5 / len(inputs) * total


class JacobianPenalty(L.Callback):
    """Logs the Jacobian penalty of every batch as `jacobian_penalty`, and adds it to the loss if it is asked to.

    It is added in place to the loss that Lightning is about to differentiate, so that accumulation, half precision and DDP treat it as a
    part of the loss; the loss that `training_step` logged is without it. `GradientAnatomyMonitor` hears the training's own pass alone: what
    a penalty that is added brings into a gradient is its `deviation`, and above 5 % of the gradient the shares are blank.

    Where it is only logged, what goes wrong is NaN and one warning; where it is to be added, a training without it would be another one, so
    that it ends with an error in its first batch.

    Args:
        strength: What the penalty is multiplied by.
        add: Add it to the loss; else it is only logged, and training stays as it is.
        match: Weights, as for `jacobian_penalty`.
        inputs_of: `batch -> inputs`; the batch, or the first of a tuple or list, unless given.

    Raises:
        ValueError: When training starts: the module has no `forward`, or it optimises by hand and the penalty is to be added. In the first
            batch, if it is to be added: inputs are no tensor, no weight of a linear layer fits, or there are more than 256 outputs.

    Example:
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
        self.strength, self.add, self.match, self.inputs_of = strength, add, match, inputs_of or _first
        self._batch: Any = None
        self._is_told = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what it cannot know: how to run the module, and which of several losses to add to."""
        if self.add and not pl_module.automatic_optimization:
            raise ValueError("JacobianPenalty(add=True): the module optimises by hand; call jacobian_penalty in its training_step")
        if type(pl_module).forward is L.LightningModule.forward:
            raise ValueError(f"JacobianPenalty runs the module on the inputs alone: give {type(pl_module).__name__} a forward")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Measure, and add."""
        penalty = self._measured(pl_module)
        pl_module.log("jacobian_penalty", penalty.detach())
        if self.add:
            loss.add_((self.strength * trainers.loss_scale(trainer, pl_module) * penalty).to(loss.dtype))

    def on_train_batch_end(self, *_: Any) -> None:
        """Let go of the batch."""
        self._batch = None

    def _measured(self, module: L.LightningModule) -> Float[Tensor, ""]:
        """The penalty of the batch; NaN where it cannot be had and is not to be added."""
        try:
            inputs = self.inputs_of(self._batch)
            if not isinstance(inputs, Tensor):
                raise ValueError(f"JacobianPenalty: inputs are a {type(inputs).__name__} and no tensor; say where they are by inputs_of=")
            return jacobian_penalty(module, inputs, self.match)
        except Exception as error:  # to watch must not end a run
            if self.add:
                raise
            if not self._is_told:
                rank_zero_warn(f"lightning_lowrank: no Jacobian penalty is logged ({type(error).__name__}): {error}")
            self._is_told = True
            return torch.full((), torch.nan, device=module.device)


def _squared(inputs: Tensor, signals: Tensor) -> Float[Tensor, ""]:
    """Sum over examples of the squared length of the gradient of one output by the weight."""
    if inputs.ndim == 2:
        return (inputs.square().sum(1) * signals.square().sum(1)).sum()
    return (signals.flatten(1, -2).mT @ inputs.flatten(1, -2)).square().sum()


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


@contextmanager
def _heard(layers: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of all calls."""
    calls: list[tuple[Tensor, Tensor]] = []
    hooks = [layer.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output))) for layer in layers]
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
