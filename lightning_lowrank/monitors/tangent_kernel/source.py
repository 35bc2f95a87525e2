"""The tangent kernel of the user's own model, on a kept batch, in the user's own training step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.replay import Replay, refuse_replay
from lightning_lowrank.loss.tap import module_named
from lightning_lowrank.maths.operators.estimates import Found
from lightning_lowrank.measuring.number_source import (
    WHOLE_MODEL,
    Numbers,
    NumberSource,
    led_by,
    refuse_seed,
    refuse_top_k,
)
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.models.names import chosen_parameters
from lightning_lowrank.models.training import Training
from lightning_lowrank.monitors.tangent_kernel.kernels import FEWEST, KernelName
from lightning_lowrank.monitors.tangent_kernel.measurement import (
    KernelEffort,
    Reference,
    TangentKernels,
    learnt_by_descent,
    quantities,
)
from lightning_lowrank.monitors.tangent_kernel.outputs import KernelOutputs, OwnOutputs, kernel_outputs

# Cadence unless one is given: a sample is so many times a step that this is a few percent of the time.
EVERY = {"full": 3000, "class_summed": 4000, "sum_of_logits": 3000}
# Columns of the outputs that are looked at: every product with a class-summed kernel takes a pair of products for each.
COLUMNS = {"full": 256, "class_summed": 10, "sum_of_logits": 1}
# Products with the Krylov space of each random vector.
STEPS = {"full": 6, "class_summed": 4, "sum_of_logits": 6}

# What every logger gets.
CORE = (
    *("ntk_lambda_max", "ntk_participation_ratio", "ntk_label_alignment"),
    *("ntk_velocity", "ntk_distance_to_start", "ntk_modes_learnt"),
)


class TangentKernel(NumberSource):
    """The empirical neural tangent kernel of the chosen parameters, on the first examples of the first batch seen.

    Args:
        kernel: "full": one row per output of each example. "class_summed": one row per example, summed over the
            outputs. "sum_of_logits": one row per example, for the sum of the outputs.
        num_examples: Number of examples to keep, on each process.
        num_projections: Number of projections for sums and comparisons; it keeps twice this number times the outputs in
            memory.
        top_k: Number of modes to track.
        output_module: The layer whose output is used, if the loss is not one of torch's functions.
        loss_fn: `(module, batch) -> loss`, used instead of the module's own training step.
        match: Parameters: globs on the name, `re:REGEX`, `type:LAYERCLASS`; all trained ones by default.
        exclude: Patterns of what to leave out, as for `match`.
        num_outputs: Number of columns of the outputs to use, drawn once. By default at most 256, and at most 10 for the
            class-summed kernel.
        train_mode: Whether to run the module as in training. With batch normalisation, it is then not a kernel of
            single examples.
        seed: Seed for the projections and for random numbers of the module.

    Raises:
        ValueError: An option is unknown or out of range; in `plan`, a pattern matches nothing or the step cannot be run
            again.
    """

    name = "ntk"
    level = "functions"

    def __init__(
        self,
        kernel: KernelName = "class_summed",
        *,
        num_examples: int = 64,
        num_projections: int = 16,
        top_k: int = 3,
        output_module: str | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        num_outputs: int | None = None,
        train_mode: bool = False,
        seed: int = 0,
    ) -> None:
        if kernel not in get_args(KernelName):
            raise ValueError(f"kernel={kernel!r} must be one of {list(get_args(KernelName))}")
        _refuse_small(num_examples=(num_examples, 2), num_projections=(num_projections, FEWEST))
        refuse_top_k(top_k)
        self.num_outputs = COLUMNS[kernel] if num_outputs is None else num_outputs
        _refuse_small(num_outputs=(self.num_outputs, 1))
        _refuse_odd(loss_fn, train_mode)
        refuse_seed(seed)
        self.match, self.exclude, self.output_module = match, exclude, output_module
        self.num_examples, self.loss_fn, self.train_mode, self.seed = num_examples, loss_fn, train_mode, seed
        self.state = TangentKernels(kernel, KernelEffort(top_k, num_projections, steps=STEPS[kernel]), seed)
        self.quantities = led_by(CORE, quantities(top_k))
        self._replay = self._new_replay()
        self._named: dict[str, nn.Parameter] = {}
        self._training: Training | None = None
        self._batch: Batch | None = None
        self._waiting: Mapping[str, Any] = {}
        self._num_rows = 0
        self._shared = False

    @property
    def every(self) -> int:
        """Default cadence."""
        return EVERY[self.state.kernel]

    def plan(self, training: Training) -> None:
        """Choose the parameters; frozen ones may be trained later."""
        self._named = chosen_parameters(training.module, self.match, self.exclude)
        if not self._named:
            raise ValueError(
                f"match={self.match!r} without exclude={self.exclude!r} leaves no parameter for the kernel"
            )
        is_descent = all(type(optimizer) is SGD for optimizer in training.optimizers)
        self.absent = [] if is_descent else learnt_by_descent(self.state.effort.top_k)
        if self._training is None or self._training.module is not training.module:
            self._begin(training)
        self._training = training

    def labels(self) -> Sequence[str]:
        """The whole model, and its parameters."""
        return [WHOLE_MODEL, *self._trained]

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_training": None, "_named": {}, "_replay": self._new_replay(), "_batch": None}

    def batch_begins(self, batch: Batch) -> None:
        """Keep the first batch."""
        self._batch, self._shared = batch, batch.training.team.size > 1
        if self._replay.batch is None and self._waiting and self._waiting.get("options") == self._options:
            self._resume(self._waiting, batch.training.device)
        if self._replay.batch is None:
            self.state.forget()
            self._replay.keep(batch.data, batch.index)
        self._waiting = {}

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """All numbers of the kernel after the step."""
        batch, self._batch = self._batch, None
        assert batch is not None
        with ExitStack() as stack:
            outputs = self._outputs(stack, team)
            generator = torch.Generator(outputs.jacobian.outputs.device).manual_seed(batch.seed)
            num_steps = batch.training.step + 1  # that of the sample is done
            found = self.state.measure(outputs, _rate(batch.training.optimizers), num_steps, generator)
        self._num_rows = outputs.shape[0]
        return list(_numbers(found, list(self._trained)))

    def detach(self) -> None:
        """Drop the batch of the step."""
        self._batch = None

    def facts(self) -> dict[str, float]:
        """Properties of the kernel, and how it was computed."""
        if self.state.exact is None:
            return {}
        return {"exact": float(self.state.exact), "train_mode": float(self.train_mode), "rows": float(self._num_rows)}

    def state_dict(self) -> dict[str, Any]:
        """The kept batch, and the kernels with which later ones are compared.

        Empty if the batch is not a plain nest of tensors, numbers and strings, or if several processes have different
        ones. A resumed run then begins again, as it does with other options.
        """
        if self._waiting:
            return dict(self._waiting)
        first, last = self.state.first, self.state.last
        kept = self._replay.state_dict()
        if first is None or last is None or self._shared or not kept:
            return {}
        known: dict[str, Any] = {**kept, "tops": dict(self.state.tops)}
        known |= {"first": first.state_dict(), "last": last.state_dict(), "options": self._options}
        return known if self.state.directions is None else known | {"directions": self.state.directions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load them, once their device is known."""
        self._training = None  # another run
        self._replay, self._waiting = self._new_replay(), state
        self.state.forget()

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._named.items() if p.requires_grad}

    @property
    def _options(self) -> dict[str, Any]:
        """With others a kernel is another, of other rows or outputs."""
        drawn = {
            "seed": self.seed,
            "num_outputs": self.num_outputs,
            "num_projections": self.state.effort.num_projections,
        }
        seen = {"num_examples": self.num_examples, "train_mode": self.train_mode, "output_module": self.output_module}
        return {"kernel": self.state.kernel} | drawn | seen

    def _new_replay(self) -> Replay:
        return Replay(self.loss_fn, self.num_examples, eval_mode=not self.train_mode, seed=self.seed)

    def _begin(self, training: Training) -> None:
        """Refuse what cannot be measured, in a run that begins."""
        module = training.module
        self._replay.output_module = None if self.output_module is None else module_named(module, self.output_module)
        for name, parameter in module.named_parameters():
            if isinstance(parameter, DTensor):
                why = (
                    "the graph of the outputs is lost when its shards are freed; train with strategy='ddp' or on "
                    "one device"
                )
                raise ValueError(f"{name!r} is sharded, so the tangent kernel cannot be computed: {why}")
        for name, parameter in self._named.items():
            if parameter.is_complex() and parameter.requires_grad:
                raise ValueError(
                    f"{name!r} is complex, but the tangent kernel needs real parameters; leave it out with exclude "
                    "or match"
                )
        for path, part in module.named_modules():
            if self.train_mode and isinstance(part, nn.SyncBatchNorm) and training.team.size > 1:
                raise ValueError(
                    f"{path!r}: the exchange of SyncBatchNorm has no second derivative; use train_mode=False"
                )
        refuse_replay(training, self.loss_fn)

    def _resume(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._replay.resume(state, device)
        self.state.tops = {name: vectors.to(device) for name, vectors in state["tops"].items()}
        self.state.first, self.state.last = (Reference.of_state(state[name], device) for name in ("first", "last"))
        self.state.directions = state["directions"].to(device) if "directions" in state else None

    def _outputs(self, stack: ExitStack, team: Team) -> KernelOutputs:
        """The outputs of the kept batch, with their graph until the stack is left; the same on every process, or an
        error on every one.
        """
        own: OwnOutputs | None = None
        error: Exception | None = None
        try:
            if not self._trained:
                raise ValueError("none of the chosen parameters is trained")
            assert self._training is not None
            loss = stack.enter_context(self._replay(self._training)).output_loss()
            own = OwnOutputs.of(loss, self.state.kernel, num_columns=self.num_outputs, seed=self.seed)
        except Exception as failed:
            error = failed
        outputs = kernel_outputs(own, self._trained, team)
        if outputs is None or not len(outputs.jacobian.outputs):
            if self.state.first is None:  # of another batch there may be a kernel
                self._replay.batch = None
            alone = "another process has no outputs, or outputs of another kind"
            raise error or RuntimeError(alone if outputs is None else "no row of the outputs contributes to the loss")
        return outputs


def _numbers(found: Found, parameters: Sequence[str]) -> Iterator[Numbers]:
    """Of the whole model, and of each parameter."""
    yield Numbers(WHOLE_MODEL, found.values, found.errors)
    for i, parameter in enumerate(parameters):
        yield Numbers(
            parameter, *({name: row[i] for name, row in rows.items()} for rows in (found.layers, found.layer_errors))
        )


def _rate(optimizers: Sequence[Optimizer]) -> float | Tensor | None:
    """The learning rate that gradient descent with one rate has in the long run; None for other optimizers."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    steps = {
        (float(g["lr"]), g["momentum"], g["dampening"], g["maximize"])
        for g in groups
        if "dampening" in g and "maximize" in g and g.get("lr") is not None
    }
    if any(type(optimizer) is not SGD for optimizer in optimizers) or len(steps) != 1:
        return None
    rate, momentum, dampening, maximizes = steps.pop()
    if maximizes:
        return None
    return rate * (1 - dampening) / (1 - momentum) if momentum else rate


def _refuse_small(**numbers: tuple[int, int]) -> None:
    for name, (number, least) in numbers.items():
        if type(number) is not int or number < least:
            raise ValueError(f"{name}={number!r} must be a whole number of at least {least}")


def _refuse_odd(loss_fn: object, train_mode: object) -> None:
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(
            f"loss_fn={loss_fn!r} must be a function (module, batch) -> loss, or None for the module's own training "
            "step"
        )
    if type(train_mode) is not bool:
        raise ValueError(f"train_mode={train_mode!r} must be True or False")
