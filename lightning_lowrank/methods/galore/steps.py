"""Steps in low rank: during each step of an optimizer, projections replace matrices."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.methods.elementwise import Decay, decay_, decay_of, decayed, num_bytes, state_of
from lightning_lowrank.methods.galore.matrix import LINEAR, SQUARES, LowRankMatrix
from lightning_lowrank.methods.method import Act
from lightning_lowrank.models.training import Training

# What chooses matrices of a module, and says what it left out.
Choose = Callable[[nn.Module], tuple[list[LowRankMatrix], Mapping[str, str]]]


@dataclass
class Narrowed:
    """A parameter during a step: its values are set aside and replaced by its projection.

    Attributes:
        matrix: The matrix.
        optimizer: The optimizer that steps it.
        group: Parameter group of the optimizer.
        decay: Kind of weight decay of the optimizer.
        values: Values of the parameter.
        gradient: Gradient of the parameter.
    """

    matrix: LowRankMatrix
    optimizer: Optimizer
    group: dict[str, Any]
    decay: Decay
    values: Tensor
    gradient: Tensor

    def given(self) -> Tensor:
        """The gradient to project, as a matrix; with the weight decay if this is coupled."""
        gradient = self.gradient.to_dense() if self.gradient.is_sparse else self.gradient
        if self.decay == "coupled":
            scale = getattr(self.optimizer, "grad_scale", None)
            gradient = decayed(gradient, self.values if scale is None else self.values * scale, self.group)
        return gradient.flatten(1)

    def widen(self) -> Tensor:
        """Restore the parameter, and return what the optimizer has made of the replacement."""
        parameter = self.matrix.parameter
        left, parameter.grad = parameter.data, None
        parameter.data, parameter.grad = self.values, self.gradient
        return left


@dataclass(eq=False)
class LowRankSteps(Act):
    """Trains matrices in low rank, in the user's own optimizer.

    During one step, hooks of the optimizer give it the projection as a gradient, and zeros of the same shape as a
    weight. Its state therefore has the small shape. What it makes of the zeros is its step, which is mapped back to the
    weight. Between steps, parameters, gradients and groups are as in any other training.

    Attributes:
        choose: Chooses the matrices.
        scale: Factor of the steps.
        name: Name for messages.
        matrices: Matrices of the training, by id of the parameter.
    """

    choose: Choose
    scale: float
    name: str = "GaLore"
    not_sharded: str = "torch cannot replace them by smaller tensors during a step"
    matrices: dict[int, LowRankMatrix] = field(default_factory=dict)
    optimizers: list[Optimizer] = field(default_factory=list)
    _decays: dict[tuple[int, int], Decay] = field(default_factory=dict)
    _hooks: list[RemovableHandle] = field(default_factory=list)
    _narrowed: list[Narrowed] = field(default_factory=list)
    _loaded: dict[str, Any] | None = None
    _is_measuring: bool = False

    def begin(self, training: Training) -> str:
        """Choose matrices and hook the optimizers.

        Raises:
            ValueError: A pattern matches nothing, no optimizer has a matched matrix, or an optimizer does not update
                each entry independently. Also if the resumed run had other matrices.
        """
        self.end()
        found, left_out = self.choose(training.module)
        optimizers = list(training.optimizers)
        self._refuse_missing(found, optimizers)
        self._decays = {}
        matrices = {id(matrix.parameter): matrix for matrix in found}
        for optimizer, number, group in _owning(optimizers, matrices):
            self._decays[id(optimizer), number] = decay_of(optimizer, group)
            self._refuse_unknown(optimizer, group, matrices)
        if self._loaded is not None:
            self._resume(found, self._loaded)
        self.matrices, self.optimizers, self._loaded = matrices, optimizers, None
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            # Hooks of others that read a step see it done.
            cast(OrderedDict[int, Any], optimizer._optimizer_step_post_hooks).move_to_end(
                self._hooks[-1].id, last=False
            )
        self._is_measuring = any(matrix.is_measuring for matrix in self.stepped())
        return self._table(left_out)

    def end(self) -> None:
        """Remove the hooks, and restore what an interrupted step had set aside."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        while self._narrowed:
            self._narrowed.pop().widen()

    def forget(self) -> None:
        """The next run has its own bases."""
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """Bases and counts by matrix."""
        if self._loaded is not None:
            return self._loaded
        return {matrix.name: matrix.state_dict() for matrix in self.matrices.values()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state until the matrices are known."""
        self._loaded = state

    def __getstate__(self) -> dict[str, Any]:
        """A copy acts on a training of its own."""
        return vars(self) | {"matrices": {}, "optimizers": [], "_decays": {}, "_hooks": [], "_narrowed": []}

    def stepped(self) -> list[LowRankMatrix]:
        """The matrices that an optimizer steps now."""
        owned = (p for o in self.optimizers for g in o.param_groups for p in g["params"] if p.requires_grad)
        return [self.matrices[id(p)] for p in owned if id(p) in self.matrices]

    def bytes_of(self, matrix: LowRankMatrix) -> int:
        """Bytes that optimizer and projection keep for a matrix now."""
        kept = (o.state[matrix.parameter] for o in self.optimizers if matrix.parameter in o.state)
        return matrix.num_bytes + sum(map(num_bytes, kept))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Narrow the matrices when gradients are there: after the user's own closure, and all other hooks."""
        given = args[1] if len(args) > 1 else kwargs.get("closure")

        def closure() -> Any:
            loss = None if given is None else given()
            try:
                self._narrow(optimizer)
            except BaseException:  # such as lack of memory: whoever goes on has whole weights
                self._widened(optimizer)
                raise
            return loss

        return (args[:1] + (closure,) + args[2:], kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closure})

    @torch.no_grad()
    def _narrow(self, optimizer: Optimizer) -> None:
        if any(entry.optimizer is optimizer for entry in self._narrowed):
            return  # the step of a subclass calls that of its parent, which calls the hooks too
        for _, number, group in _owning([optimizer], self.matrices):
            decay = self._decays.get((id(optimizer), number)) or self._decay_of_new(optimizer, number, group)
            for parameter in group["params"]:
                matrix = self.matrices.get(id(parameter))
                if matrix is not None and parameter.grad is not None:
                    self._set_aside(Narrowed(matrix, optimizer, group, decay, parameter.data, parameter.grad))

    def _set_aside(self, entry: Narrowed) -> None:
        parameter, state = entry.matrix.parameter, entry.optimizer.state
        if _of_other_shape(state.get(parameter, {}), entry.matrix.low_shape):
            del state[parameter]  # of a run without this method: a moment of all entries has no place here
        known = state.get(parameter, {})
        with torch.autocast(parameter.device.type, enabled=False):
            low = entry.matrix.narrow(entry.given(), known, entry.group).to(parameter.dtype)
        if parameter in state and not known:
            del state[parameter]
        self._narrowed.append(entry)
        parameter.grad = None
        parameter.data = torch.zeros_like(low)
        parameter.grad = low

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put the matrices back, each with its step."""
        skipped = getattr(optimizer, "found_inf", None)
        for entry, step in self._widened(optimizer):
            parameter = entry.matrix.parameter
            with torch.autocast(step.device.type, enabled=False):
                wide = entry.matrix.widen(step, entry.given, entry.group)
            if entry.decay == "decoupled":
                decay_(parameter, entry.group, skipped)
            parameter.add_(wide.view(parameter.shape), alpha=self.scale)
            entry.matrix.release()
        if self._is_measuring and not any(matrix.is_measuring for matrix in self.stepped()):
            self._is_measuring = False
            self.say(f"the ranks have been measured: {self._table({})}")

    def _widened(self, optimizer: Optimizer) -> list[tuple[Narrowed, Tensor]]:
        """Put all matrices of an optimizer back, each with what it made of the zeros."""
        own = [entry for entry in self._narrowed if entry.optimizer is optimizer]
        self._narrowed = [entry for entry in self._narrowed if entry.optimizer is not optimizer]
        return [(entry, entry.widen()) for entry in own]

    def _decay_of_new(self, optimizer: Optimizer, number: int, group: dict[str, Any]) -> Decay:
        """Of a group that joined in mid-run: if it is refused now, that of the others counts."""
        others = [decay for (owner, _), decay in self._decays.items() if owner == id(optimizer)]
        try:
            decay = decay_of(optimizer, group)
        except ValueError as error:
            self.warn(f"a new parameter group: {error}")
            decay = others[0] if others else "decoupled"
        self._decays[id(optimizer), number] = decay
        return decay

    def _refuse_missing(self, found: Sequence[LowRankMatrix], optimizers: Sequence[Optimizer]) -> None:
        owned = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        names = {id(matrix.parameter): matrix.name for matrix in found}
        double = next((names[one] for one in names if owned.count(one) > 1), None)
        if double is not None:
            raise ValueError(
                f"{self.name}: {double!r} is in two optimizers, but a basis can serve the moments of only one"
            )
        # A frozen one may join an optimizer later.
        if not set(owned) & set(names) and all(matrix.parameter.requires_grad for matrix in found):
            raise ValueError(f"{self.name}: no optimizer has any of the matrices {list(names.values())[:10]}")

    def _refuse_unknown(
        self, optimizer: Optimizer, group: dict[str, Any], matrices: Mapping[int, LowRankMatrix]
    ) -> None:
        """Moments that cannot be turned."""
        matrix = next(matrices[id(p)] for p in group["params"] if id(p) in matrices)
        if matrix.policy.on_refresh != "rotate":
            return
        kept = state_of(optimizer, group, matrix.low_shape, matrix.parameter.dtype)
        unknown = kept.keys() - {"step", "mu_product", *LINEAR, *SQUARES}
        if unknown:
            raise ValueError(
                f"{self.name}(on_refresh='rotate'): {type(optimizer).__name__} keeps {sorted(unknown)}, and it is "
                "unknown how to rotate these; use 'keep' or 'reset'"
            )

    def _resume(self, found: Sequence[LowRankMatrix], state: Mapping[str, Any]) -> None:
        names = [matrix.name for matrix in found]
        if set(names) != set(state):
            raise ValueError(
                f"{self.name}: the resumed run had the matrices {sorted(state)[:10]} in low rank, and this run has "
                f"{sorted(names)[:10]}; give the same match and exclude"
            )
        for matrix in found:
            matrix.load_state_dict(state[matrix.name])

    def _table(self, left_out: Mapping[str, str]) -> str:
        """What is trained in low rank, and what that saves."""
        rows, before, after = [], 0, 0
        for optimizer, _, group in _owning(self.optimizers, self.matrices):
            for parameter in group["params"]:
                if matrix := self.matrices.get(id(parameter)):
                    full, low = (
                        num_bytes(state_of(optimizer, group, shape, parameter.dtype))
                        for shape in (parameter.shape, matrix.low_shape)
                    )
                    low += matrix.planned_bytes
                    before, after = before + full, after + low
                    sizes = f"{matrix.shape[0]} x {matrix.shape[1]} as {matrix.low_shape[0]} x {matrix.low_shape[1]}"
                    rows.append(f"  {matrix.name}  {sizes}  {full:,} -> {low:,} bytes{_samples_of(matrix)}")
        kept = f"; left alone: {', '.join(f'{tag} ({why})' for tag, why in left_out.items())}" if left_out else ""
        share = f" ({after / before - 1:+.0%})" if before else ""
        head = (
            f"{len(rows)} matrices in low rank; optimizer state, bases included: {before:,} -> {after:,} bytes{share}"
        )
        return "\n".join([head + kept, *rows])


def drop_low_rank(optimizer: Optimizer) -> int:
    """Drop state in another shape than its parameter; returns the number of parameters that had some."""
    dropped = [p for p, state in optimizer.state.items() if _of_other_shape(state, tuple(p.shape))]
    for parameter in dropped:
        del optimizer.state[parameter]
    return len(dropped)


def _owning(
    optimizers: Sequence[Optimizer], matrices: Mapping[int, LowRankMatrix]
) -> Iterator[tuple[Optimizer, int, dict[str, Any]]]:
    """Groups that have one of the matrices, with their number."""
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            if any(id(parameter) in matrices for parameter in group["params"]):
                yield optimizer, number, group


def _samples_of(matrix: LowRankMatrix) -> str:
    """What its rank was made of, or is going to be."""
    if matrix.is_measuring:
        return ", until the rank is measured"
    return f" (energy ranks {', '.join(f'{sample:g}' for sample in matrix.samples)})" if matrix.samples else ""


def _of_other_shape(state: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    """Whether an optimizer keeps something of a matrix of another shape."""
    tensors = (value for value in state.values() if isinstance(value, Tensor))
    return any(value.numel() > 1 and tuple(value.shape) != shape for value in tensors)
