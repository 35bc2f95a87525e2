"""Curvature of the user's own loss: Hessian, Gauss-Newton matrix and Fisher information, in the user's own training
step.

Shape letters:  P entries of all parameters   k directions
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Num
from torch import Tensor, nn
from torch.optim import SGD

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.double_backward import Choice, choose, hooked, look_together
from lightning_lowrank.loss.output_loss import OutputLoss
from lightning_lowrank.loss.replay import Replay, refuse_replay
from lightning_lowrank.loss.tap import LossTap, module_named
from lightning_lowrank.maths.operators.estimates import Estimate, Found
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Curve, Numbers, NumberSource, Quantity, led_by
from lightning_lowrank.measuring.source import Batch, Step
from lightning_lowrank.models.names import chosen_parameters
from lightning_lowrank.models.training import Training
from lightning_lowrank.monitors.curvature.critical import along_update
from lightning_lowrank.monitors.curvature.loss_operators import loss_operators
from lightning_lowrank.monitors.curvature.measurement import (
    CELLS,
    EFFORTS,
    Curvatures,
    densities_of,
    quantities,
    refuse,
)
from lightning_lowrank.monitors.curvature.movement import Movement
from lightning_lowrank.monitors.curvature.self_check import difference_defect

Level = Literal["light", "standard", "full"]
WhichBatch = Literal["live", "fixed"]

# What every logger gets.
CORE = (
    *("curvature_valid", "batch_sharpness", "batch_sharpness_over_threshold", "sharpness_over_threshold"),
    *("hessian_lambda_max", "hessian_trace", "critical_sharpness", "gradient_in_top", "update_in_top"),
)

# How a loss is seen, in words.
HOW = {"inline": "seen on", "replay": "the step is run again to see the loss, because of"}
UNSEEN = (
    "the loss was not seen. In your own loop, call watch.loss(loss) before its backward pass; in manual "
    "optimization, call self.manual_backward(loss)"
)


@dataclass
class Held:
    """State that is kept from the first batch of a sample to its end.

    Attributes:
        batch: The latest batch.
        tap: Listens to the step.
        found: What was measured on the step's own graph.
        measured: Names of the parameters by which it was: those that are trained may be others a moment later.
        rate: The learning rate of the step.
    """

    batch: Batch | None = None
    tap: LossTap | None = None
    found: Found | None = None
    measured: Sequence[str] = ()
    rate: float | Tensor = 0.0


class Curvature(NumberSource):
    """Curvature of the loss with respect to the chosen parameters.

    Args:
        level: How much is measured.
        operators: Any of `hessian`, `gauss_newton`, `empirical_fisher`, `monte_carlo_fisher`; empty for critical
            sharpness only, which needs only forward passes.
        top_k: Number of top directions to track.
        batch: "live": the loss of the step itself, if this does not change the training. "fixed": always the loss of
            the first batch seen.
        loss_fn: `(module, batch) -> loss`, used instead of the module's own training step.
        output_module: The layer whose output enters the loss, if the loss is not one of torch's functions.
        match: Parameters: globs on the name, `re:REGEX`, `type:LAYERCLASS`; all trained ones by default.
        exclude: Patterns of what to leave out, as for `match`.

    Raises:
        ValueError: An option is unknown; in `plan`, a pattern matches nothing.
    """

    name = "curvature"

    def __init__(
        self,
        level: Level = "light",
        operators: Sequence[str] = ("hessian", "gauss_newton"),
        *,
        top_k: int = 5,
        batch: WhichBatch = "live",
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        output_module: str | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> None:
        refuse(level, operators, top_k)
        if batch not in get_args(WhichBatch):
            raise ValueError(f"batch={batch!r} must be one of {list(get_args(WhichBatch))}")
        self.batch, self.loss_fn, self.output_module, self.match, self.exclude = (
            batch,
            loss_fn,
            output_module,
            match,
            exclude,
        )
        self.effort = EFFORTS[level]
        self.operators = tuple(name for name in operators if self.effort.probes or name == "hessian")
        self.state = Curvatures(self.effort, top_k)
        self.quantities = led_by(CORE, self._quantities(top_k))
        densities = [Curve(name, CELLS, middles) for name, middles in densities_of(self.operators)]
        self.curves = densities if self.effort.lowest else []
        self._replay = Replay(loss_fn)
        self._choice: Choice | None = None
        self._named: dict[str, nn.Parameter] = {}
        self._training: Training | None = None
        self._multiple: float | None = None
        self._movement = Movement()
        self._sample = Held()
        # The kept batch of the run that is resumed.
        self._waiting: Mapping[str, Any] = {}
        self._shared = False

    def plan(self, training: Training) -> None:
        """Choose the parameters; frozen ones may be trained later."""
        self._named = chosen_parameters(training.module, self.match, self.exclude)
        # Adaptive rates differ from weight to weight, so that no direction has an edge of its own.
        is_descent = any(type(optimizer) is SGD for optimizer in training.optimizers)
        self.absent = () if is_descent else ("batch_sharpness_over_threshold",)
        begins = self._training is None or self._training.module is not training.module
        self._training = training
        if begins:
            self._begin(training)
        if self.operators and self._follows:
            self._movement.begin(self._trained)

    def labels(self) -> Sequence[str]:
        """The whole model; also each parameter if it has its own numbers."""
        return [WHOLE_MODEL, *self._trained] if self.effort.probes and self.operators else [WHOLE_MODEL]

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {
            "_training": None,
            "_named": {},
            "_replay": Replay(self.loss_fn),
            "_sample": Held(),
            "_movement": Movement(),
        }

    def _begin(self, training: Training) -> None:
        """Choose how to see the loss, in a run that begins."""
        layer = None if self.output_module is None else module_named(training.module, self.output_module)
        self._replay, self._shared = Replay(self.loss_fn, output_module=layer), training.team.size > 1
        if self._waiting and self._stays:
            self._replay.resume(self._waiting, training.device)
        self._waiting = {}
        if self.operators:
            self._choice = choose(training, batch=self.batch, loss_fn=self.loss_fn)
        if self._follows:
            refuse_replay(training, self.loss_fn)

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._named.items() if p.requires_grad}

    def batch_begins(self, batch: Batch) -> None:
        """Observe the inputs of the loss, or keep the batch for later."""
        self._sample.batch = batch
        if self._sample.found is not None or self._sample.tap is not None:
            return
        if self.operators and self.effort.probes:
            name, size = self.operators[0], sum(p.numel() for p in self._trained.values())
            self._movement.before = before = self.state.before(name, size)
            self._movement.off = None if before is None else self.state.off(name, before)
        if self._replay.batch is None or (self.batch == "live" and self._follows and not self._is_replayed):
            self._replay.keep(batch.data, batch.index)
        if self._choice is not None and self._choice.mode == "inline":
            self._sample.tap = LossTap(self._replay.output_module)
            self._sample.tap.enter()

    def loss_live(self, loss: Tensor, scale: Tensor | float) -> None:
        """Measure on the step's own graph, once a sample."""
        if self._sample.tap is None or self._choice is None or self._sample.batch is None:
            return
        tap, self._sample.tap = self._sample.tap, None
        tap.exit()
        training = self._sample.batch.training
        hooks = "hooks that the step sets on tensors" if tap.is_hooked else hooked(training.module)
        self._choice = look_together(self._choice, loss, training.team, hooks)
        if self._choice.mode == "inline":
            self._sample.found = self._measured(loss / scale, lambda: tap.reproduce(loss, scale))

    def gradients_final(self, step: Step) -> list[Any]:
        """Keep the gradient, and the weights to compute the update."""
        if self._follows:
            self._movement.begin(self._trained if self.operators else {})  # those that were frozen have not moved
            rate = step.optimizer.param_groups[0].get("lr")
            self._sample.rate = math.nan if rate is None else rate
            self._movement.step_begins(step, self._trained)
        return []

    def batch_over(self) -> None:
        """Stop listening."""
        if self._sample.tap is not None:
            self._sample.tap.exit()

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """The measured numbers, and the movement along the top directions."""
        if self._choice is not None and self._is_replayed:
            assert self._training is not None
            with self._replay.together(self._training) as seen:
                self._choice = look_together(self._choice, seen.loss, team)
                self._sample.found = self._measured(seen.loss, seen.output_loss)
        elif self._sample.tap is not None:  # which the loss takes away
            self.trouble = self.trouble or ValueError(UNSEEN)
        found, parameters = self._sample.found or Found(), self._sample.measured
        self._movement.note_shares(found, self._trained)
        if "curvature_symmetry_defect" in found.values:
            self.state.hold(found, self._difference_defect(team))
        self.state.judge(found)
        if self._movement.start:
            try:
                self._critical(team, found)
            except Exception as error:  # the rest is known
                self.trouble = self.trouble or error
        self._drop()
        return list(_numbers(found, parameters))

    def detach(self) -> None:
        """Drop the sample."""
        self.batch_over()
        self._drop()

    def _drop(self) -> None:
        self._sample = Held()
        self._movement.drop()

    def top_directions(self) -> list[tuple[nn.Parameter, Num[Tensor, "k ..."]]]:
        """Parameters with their parts of the top eigenvectors of the Hessian at the last sample; empty before the
        first, NaN if products were wrong.
        """
        sizes = [p.numel() for p in self._trained.values()]
        tops = self.state.before("hessian", sum(sizes))
        if tops is None or self.state.valid is None:
            return []
        believed = torch.where(self.state.valid != 0, tops, torch.nan)
        parts = zip(self._trained.values(), believed.split(sizes, -1), strict=True)
        return [(p, part.view(-1, *p.shape)) for p, part in parts]

    def facts(self) -> dict[str, float]:
        """How the loss is seen, and the size of the initial weights."""
        kept = (
            {"bytes": float(sum(p.nbytes for p in self._movement.initial.values()))} if self._movement.initial else {}
        )
        return kept if self._choice is None else kept | {"replayed": float(self._is_replayed)}

    def note(self) -> str:
        """How the loss is seen, and why."""
        return "" if self._choice is None else f"{HOW[self._choice.mode]} {self._choice.reason}"

    def state_dict(self) -> dict[str, Any]:
        """The top directions, the initial weights, and a fixed batch, so that a resumed run continues with them. The
        batch is left out if several processes have different ones.
        """
        known = {"multiple": self._multiple, "valid": self.state.valid}
        kept = {"tops": dict(self.state.tops), "sines": dict(self.state.sines), "initial": dict(self._movement.initial)}
        stays = {} if self._shared or not self._stays else self._replay.state_dict() or self._waiting
        return {**kept, **{name: value for name, value in known.items() if value is not None}, "replay": dict(stays)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load them."""
        self._training = None  # another run, in which the loss may have to be seen in another way
        self._waiting = state.get("replay", {})
        self.state.tops, self._movement.initial = dict(state.get("tops", {})), dict(state.get("initial", {}))
        self.state.sines = dict(state.get("sines", {}))
        multiple, self.state.valid = state.get("multiple"), state.get("valid")
        self._multiple = None if multiple is None else float(multiple)  # a tensor in older checkpoints

    @property
    def _stays(self) -> bool:
        """Whether one batch is kept for the whole run."""
        return self.batch == "fixed" or self.loss_fn is not None

    @property
    def _is_replayed(self) -> bool:
        return self._choice is not None and self._choice.mode == "replay"

    @property
    def _follows(self) -> bool:
        """Whether it looks at gradients and updates."""
        return bool(self.effort.probes) or not self.operators

    def _difference_defect(self, team: Team) -> Estimate:
        """The same on every process; NaN where the step cannot be run again, or not in one of them."""
        params = list(self._trained.values())

        found = torch.full((2,), torch.nan, device=params[0].device)
        if self._training is not None and self._choice is not None and self._choice.only is None:
            with suppress(Exception):
                defect = difference_defect(partial(self._replay.loss, self._training), params)
                found = torch.stack([defect.value, defect.error]).to(found)
        return Estimate(*(team.all_reduce(found) / team.size))

    def _critical(self, team: Team, found: Found) -> None:
        """How far the loss could have followed the update."""

        def loss() -> Tensor:
            assert self._training is not None
            device = self._training.device
            try:
                with self._replay(self._training) as seen:
                    value = seen.loss.detach().to(working_dtype(device), copy=True)
            except Exception as error:
                if team.size == 1:
                    raise
                # The others wait for this one.
                self.trouble, value = error, torch.full((), torch.nan, dtype=working_dtype(device), device=device)
            return team.all_reduce(value) / team.size

        params, rate = list(self._trained.values()), self._sample.rate
        critical = along_update(params, list(self._movement.start.values()), loss, self._multiple)
        self._multiple = critical.guess
        multiple, error = torch.tensor([critical.multiple, critical.error], device=params[0].device)
        found.note("critical_multiple", Estimate(multiple, error))
        found.note("critical_sharpness", Estimate(2 / (rate * multiple), 2 * error / (rate * multiple.square())))

    def _measured(self, loss: Tensor, outputs: Callable[[], OutputLoss]) -> Found:
        """All operators of a loss, the same on every process."""
        batch = self._sample.batch
        assert batch is not None
        known: dict[str, Any] = {
            "optimizers": batch.training.optimizers,
            "team": batch.training.team,
            "seed": batch.seed,
        }
        operators = loss_operators(loss, outputs, self._trained, self.operators, **known)
        self.trouble = operators.error
        self._sample.measured = operators.layout.names
        seed = 0 if self.batch == "fixed" else batch.seed  # of a batch that stays the random vectors stay too
        return self.state.measure(operators, torch.Generator(loss.device).manual_seed(seed))

    def _quantities(self, top_k: int) -> Iterator[Quantity]:
        yield from quantities(self.operators, self.effort, top_k)
        if self.effort.probes and self.operators:
            moves = ("gradient_in_top", "update_in_top", "displacement_in_top")
            yield from (*(Quantity(name, estimated=True) for name in moves), Quantity("in_top_chance"))
        if self._follows:
            yield from (Quantity(name, estimated=True) for name in ("critical_multiple", "critical_sharpness"))


def _numbers(found: Found, parameters: Sequence[str]) -> Iterator[Numbers]:
    """Of the whole model, and of each parameter."""
    yield Numbers(WHOLE_MODEL, found.values, found.errors, found.curves)
    for i, parameter in enumerate(parameters if found.layers else ()):
        yield Numbers(
            parameter, *({name: row[i] for name, row in rows.items()} for rows in (found.layers, found.layer_errors))
        )
