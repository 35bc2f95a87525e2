"""Curvature of the user's own loss: Hessian, Gauss-Newton matrix and Fisher information, in the user's own training step.

Shape letters:  P entries of all parameters   k directions
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lowrank.critical import along_update
from lightning_lowrank.curvature import EFFORTS, Curvatures, Found, names
from lightning_lowrank.double_backward import Choice, choose, look_together
from lightning_lowrank.eigenspaces import energy_share
from lightning_lowrank.loss_operators import OPERATORS, loss_operators
from lightning_lowrank.losses import OutputLoss
from lightning_lowrank.names import fitting, tag
from lightning_lowrank.operators import Layout
from lightning_lowrank.replay import Replay, refuse_replay
from lightning_lowrank.sources.gauge import WHOLE, Gauge, Numbers, Quantity
from lightning_lowrank.sources.source import Begun, Step
from lightning_lowrank.spectrum import working_dtype
from lightning_lowrank.tap import LossTap, module_named
from lightning_lowrank.team import Team
from lightning_lowrank.traces import Estimate

Detail = Literal["light", "standard", "full"]
Batch = Literal["live", "fixed"]


@dataclass
class Sample:
    """What is held from the first batch of a sample to its end.

    Attributes:
        begun: The latest batch.
        tap: Listens to the step.
        found: What was measured on the step's own graph.
        measured: Names of the parameters by which it was: those that are trained may be others a moment later.
        before: The top directions of the last measurement: those of now are made for this very batch.
        gradient: Of the step, as the optimizer had it.
        start: The parameters before it.
        rate: Its learning rate.
    """

    begun: Begun | None = None
    tap: LossTap | None = None
    found: Found | None = None
    measured: Sequence[str] = ()
    before: Float[Tensor, "k P"] | None = None
    gradient: Float[Tensor, " P"] | None = None
    start: Sequence[Tensor] = ()
    rate: float | Tensor = 0.0


class Curvature(Gauge):
    """Curvature of the loss in the chosen parameters.

    Args:
        detail: How much is measured.
        operators: Any of `hessian`, `gauss_newton`, `empirical_fisher`, `monte_carlo_fisher`; none for critical sharpness alone, which
            takes forward passes only.
        top_k: Directions that are followed.
        batch: "live": the step's own loss, where that is possible without a difference to the training. "fixed": always that of the first
            batch that was seen.
        loss_fn: `(module, batch) -> loss`, in the place of the module's own training step.
        output_module: The layer whose output goes into the loss, where the loss is none of torch's.
        match: Parameters: globs on the name, `re:REGEX`, `type:LAYERCLASS`; all that are trained unless given.
        exclude: The same, taken away.

    Raises:
        ValueError: An option is another word; in `plan`, a pattern fits nothing.
    """

    name = "curvature"

    def __init__(
        self,
        detail: Detail = "light",
        operators: Sequence[str] = ("hessian", "gauss_newton"),
        *,
        top_k: int = 5,
        batch: Batch = "live",
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        output_module: str | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> None:
        _refuse(detail, operators, top_k, batch)
        self.batch, self.loss_fn, self.output_module, self.match, self.exclude = batch, loss_fn, output_module, match, exclude
        self.effort = EFFORTS[detail]
        self.operators = tuple(name for name in operators if self.effort.probes or name == "hessian")
        self.state = Curvatures(self.effort, top_k)
        self.quantities = list(self._quantities(top_k))
        self._replay = Replay(loss_fn)
        self._choice: Choice | None = None
        self._named: dict[str, nn.Parameter] = {}
        self._module: Any = None
        self._trainer: Any = None
        self._multiple: Tensor | None = None
        self._sample = Sample()

    def plan(self, module: nn.Module) -> None:
        """Choose the parameters; those that are frozen now may be trained later."""
        named = dict(module.named_parameters())
        layers = {name: module.get_submodule(name.rpartition(".")[0]) for name in named}
        chosen = set(named) if self.match is None else fitting("match", self.match, layers)
        chosen -= set() if self.exclude is None else fitting("exclude", self.exclude, layers)
        self._named = {tag(name): parameter for name, parameter in named.items() if name in chosen}
        if self._module is not module:
            self._begin(module)

    def labels(self) -> Sequence[str]:
        """The whole model, and its parameters where each has numbers of its own."""
        return [WHOLE, *self._trained] if self.effort.probes and self.operators else [WHOLE]

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_module": None, "_trainer": None, "_named": {}, "_replay": Replay(self.loss_fn), "_sample": Sample()}

    def _begin(self, module: Any) -> None:
        """Choose how to see the loss, in a run that begins."""
        self._module, self._trainer = module, module.trainer
        layer = None if self.output_module is None else module_named(module, self.output_module)
        self._replay = Replay(self.loss_fn, output_module=layer)
        if self.operators:
            self._choice = choose(self._trainer, module, batch=self.batch, loss_fn=self.loss_fn)
        if self._follows:
            refuse_replay(module, self.loss_fn)

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._named.items() if p.requires_grad}

    def batch_begins(self, begun: Begun) -> None:
        """Listen to what goes into the loss, or keep the batch for later."""
        self._sample.begun = begun
        if self._sample.found is not None or self._sample.tap is not None:
            return
        if self.operators and self.effort.probes:
            self._sample.before = self.state.before(self.operators[0], sum(p.numel() for p in self._trained.values()))
        if self._replay.batch is None or (self.batch == "live" and self._follows and not self._is_replayed):
            self._replay.keep(begun.batch, begun.index)
        if self._choice is not None and self._choice.mode == "inline":
            self._sample.tap = LossTap(self._replay.output_module)
            self._sample.tap.enter()

    def loss_live(self, loss: Tensor, scale: Tensor | float) -> None:
        """Measure on the step's own graph, once a sample."""
        if self._sample.tap is None or self._choice is None or self._sample.begun is None:
            return
        tap, self._sample.tap = self._sample.tap, None
        tap.exit()
        self._choice = look_together(self._choice, loss, self._sample.begun.team)
        if self._choice.mode == "inline":
            self._sample.found = self._measured(loss / scale, lambda: tap.reproduce(loss, scale))

    def gradients_final(self, step: Step) -> list[Any]:
        """Keep the gradient, and the weights from which the update is reckoned."""
        if self._follows:
            self._sample.rate = step.optimizer.param_groups[0]["lr"]
            self._sample.start = self._sample.start or [p.detach().clone() for p in self._trained.values()]
        if self._sample.before is not None:
            own = [(p, p.grad if id(p) in step.parameters else None) for p in self._trained.values()]
            gradient = self._flat([torch.zeros_like(p) if grad is None else grad for p, grad in own])
            gradient = gradient if step.scale is None else gradient / step.scale
            self._sample.gradient = gradient if self._sample.gradient is None else self._sample.gradient + gradient
        return []

    def batch_over(self) -> None:
        """Stop listening."""
        if self._sample.tap is not None:
            self._sample.tap.exit()

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """What was measured, and what moved along the top directions."""
        if self._choice is not None and self._is_replayed:
            with self._replay.together(self._trainer, self._module, team) as seen:
                self._choice = look_together(self._choice, seen.loss, team)
                self._sample.found = self._measured(seen.loss, seen.output_loss)
        found, parameters = self._sample.found or Found(), self._sample.measured
        if self._sample.before is not None:
            self._in_top(self._sample.before, found)
        if self._sample.start:
            try:
                self._critical(team, found)
            except Exception as error:  # the rest is known
                self.trouble = self.trouble or error
        self._sample = Sample()
        return list(_numbers(found, parameters))

    def detach(self) -> None:
        """Let go of the sample."""
        self.batch_over()
        self._sample = Sample()

    def facts(self) -> dict[str, float]:
        """How the loss is seen."""
        return {} if self._choice is None else {"replayed": float(self._is_replayed)}

    def state_dict(self) -> dict[str, Any]:
        """The top directions, so that a run that is resumed goes on from there; and the kept batch is not in it."""
        known = {"multiple": self._multiple, "valid": self.state.valid}
        return {"tops": dict(self.state.tops), **{name: tensor for name, tensor in known.items() if tensor is not None}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._module = None  # another run, in which the loss may have to be seen in another way
        self.state.tops = dict(state.get("tops", {}))
        self._multiple, self.state.valid = state.get("multiple"), state.get("valid")

    @property
    def _is_replayed(self) -> bool:
        return self._choice is not None and self._choice.mode == "replay"

    @property
    def _follows(self) -> bool:
        """Whether it looks at gradients and updates."""
        return bool(self.effort.probes) or not self.operators

    def _in_top(self, before: Float[Tensor, "k P"], found: Found) -> None:
        """What part of gradient and update is within the top directions of last time."""
        now = self._flat(list(self._trained.values()))
        if before.shape[1] != len(now):  # some were frozen, or thawed
            return
        found.values["in_top_chance"] = now.new_tensor(before.shape[0] / before.shape[1])
        if self._sample.gradient is not None and len(self._sample.gradient) == len(now):
            found.values["gradient_in_top"] = energy_share(self._sample.gradient, before)
        if self._sample.start:
            found.values["update_in_top"] = energy_share(now - self._flat(self._sample.start), before)

    def _critical(self, team: Team, found: Found) -> None:
        """How far the loss could have followed the update."""

        def loss() -> Tensor:
            device = self._module.device
            try:
                with self._replay(self._trainer, self._module) as seen:
                    value = seen.loss.detach().to(working_dtype(device), copy=True)
            except Exception as error:
                if team.size == 1:
                    raise
                # The others wait for this one.
                self.trouble, value = error, torch.full((), torch.nan, dtype=working_dtype(device), device=device)
            return team.summed(value) / team.size

        params, sample = list(self._trained.values()), self._sample
        critical = along_update(params, sample.start, loss, self._multiple)
        multiple, error, self._multiple = critical.multiple, critical.error, critical.guess
        found.note("critical_multiple", Estimate(multiple, error))
        found.note("critical_sharpness", Estimate(2 / (sample.rate * multiple), 2 * error / (sample.rate * multiple.square())))

    def _measured(self, loss: Tensor, outputs: Callable[[], OutputLoss]) -> Found:
        """All operators of a loss, the same on every process."""
        begun = self._sample.begun
        assert begun is not None
        known: dict[str, Any] = {"optimizers": begun.optimizers, "team": begun.team, "seed": begun.seed}
        operators = loss_operators(loss, outputs, self._trained, self.operators, **known)
        self.trouble = operators.error
        self._sample.measured = operators.layout.names
        return self.state.measure(operators, torch.Generator(loss.device).manual_seed(begun.seed))

    def _quantities(self, top_k: int) -> Iterator[Quantity]:
        for name, (per_site, estimated) in names(self.operators, self.effort, top_k).items():
            yield Quantity(name, per_site=per_site, estimated=estimated)
        if self.effort.probes and self.operators:
            yield from (Quantity(name) for name in ("gradient_in_top", "update_in_top", "in_top_chance"))
        if self._follows:
            yield from (Quantity(name, estimated=True) for name in ("critical_multiple", "critical_sharpness"))

    def _flat(self, tensors: Sequence[Tensor]) -> Float[Tensor, " P"]:
        return Layout.of(self._trained).flatten([tensor.detach() for tensor in tensors])


def _numbers(found: Found, parameters: Sequence[str]) -> Iterator[Numbers]:
    """Of the whole model, and of each parameter."""
    yield Numbers(WHOLE, found.values, found.errors)
    for i, parameter in enumerate(parameters if found.layers else ()):
        yield Numbers(parameter, *({name: row[i] for name, row in rows.items()} for rows in (found.layers, found.layer_errors)))


def _refuse(detail: str, operators: Sequence[str], top_k: int, batch: str) -> None:
    unknown = [name for name in operators if name not in OPERATORS]
    if isinstance(operators, str) or unknown:
        raise ValueError(f"operators={operators!r}: a list of some of {list(OPERATORS)}, or an empty one for critical sharpness alone")
    if detail not in EFFORTS:
        raise ValueError(f"level={detail!r}: one of {list(EFFORTS)}")
    if batch not in get_args(Batch):
        raise ValueError(f"batch={batch!r}: one of {list(get_args(Batch))}")
    if detail == "light" and operators and "hessian" not in operators:
        raise ValueError(f"level='light' looks at the Hessian only, and operators={list(operators)!r} has none: take level='standard'")
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: at least 1")
