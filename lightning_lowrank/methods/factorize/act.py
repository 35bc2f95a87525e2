"""`LowRankFactorize` as an act on a training: when weights become factors, and who steps them then."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_lowrank.methods.factorize.choice import Settings, chosen, refuse_nothing
from lightning_lowrank.methods.factorize.conversion import Prepared, Replaced, prepared, restructure, size
from lightning_lowrank.methods.factorize.layers import Place, places
from lightning_lowrank.methods.factorize.orthogonality import OrthogonalSteps
from lightning_lowrank.methods.factorize.waiting import Waiting
from lightning_lowrank.methods.method import Act
from lightning_lowrank.models.training import Training


@dataclass(eq=False)
class Factorization(Act):
    """Replaces weights by factors, before there are optimizers or in the middle of a training, and steps them.

    Attributes:
        settings: What was asked for.
        steps: What is done to factors in each step.
        waiting: What decides on the moment and on ranks that are measured.
        module: The one that was prepared last.
    """

    settings: Settings
    steps: OrthogonalSteps
    waiting: Waiting
    name: str = "LowRankFactorize"
    structural = True
    module: nn.Module | None = None
    _loaded: dict[str, Any] | None = None

    def prepare(self, module: nn.Module, *, fresh: bool = True) -> None:
        """Choose weights; replace them now, unless that is for later or for a checkpoint to say."""
        self.module, before = module, prepared(module)
        if before is not None:
            if before.settings != self.settings:
                raise ValueError(
                    f"{self.name}: the module is factorized already, with {before.settings}, and not with "
                    f"{self.settings}: densify it first, by LowRankFactorize.densify(module)"
                )
            return
        state = Prepared(self.settings, chosen(module, self.settings), size(module))
        if fresh:
            self._convert(state)
        module.__dict__["factorize_prepared"] = state
        module.register_load_state_dict_pre_hook(restructure)

    def settle(self, module: nn.Module) -> None:
        """Replace weights of a module that is to be trained; a checkpoint that is loaded after it changes ranks.

        Raises:
            ValueError: Factors would be no smaller than the weights.
        """
        state = prepared(module)
        if state is not None and not places(module):
            self._convert(state)

    def _convert(self, state: Prepared) -> None:
        wanted = state.choice.wanted
        if not wanted:
            refuse_nothing(state.choice.left_out)
        if self.settings.is_deferred:
            return
        ranks = {one.name: one.settled_rank(one.matrix()) for one in wanted}
        if not any(one.saves(ranks[one.name]) for one in wanted):
            raise ValueError(f"{self.name}: factors of {ranks} would be no smaller than the weights: lower rank")
        state.convert(ranks)

    def begin(self, training: Training) -> str:
        """Refuse what would not train, and hook the optimizers."""
        self.end()
        state = prepared(training.module)
        if state is None:
            raise ValueError(
                f"{self.name}: the module has no factors: call .prepare(model) before its optimizer is made"
            )
        self.module = training.module
        if self.settings.is_deferred:
            self._refuse_deferred(training)
            exchange(training.optimizers, state.convert_waiting())
        found = places(training.module)
        if not found and not self.settings.is_deferred:
            raise ValueError(
                f"{self.name}: the checkpoint is of a run without factors: load its weights into the module first, "
                "and begin a new run"
            )
        refuse_idle(self.name, training.optimizers, found)
        dtypes = {place.name: place.parameters[0].dtype for place in found}
        dense = {one.name: one.matrix().dtype for one in state.choice.wanted} if not found else {}
        self.steps.refuse(self.name, training.optimizers, dtypes | dense)
        self.steps.begin(training.optimizers, found)
        is_dense = self.settings.is_deferred and not found
        self.waiting.begin(state.choice.wanted if is_dense else (), self._loaded is not None)
        return table(training.module, state, found)

    def batch_over(self, training: Training) -> None:
        """Sample what decides, and factorize when it has."""
        state = prepared(training.module)
        if state is None or not self.waiting.is_on:
            return
        ranks = self.waiting.sampled(training.step)
        if ranks is None:
            return
        new = state.convert(ranks)
        exchange(training.optimizers, new)
        found = places(training.module)
        self.steps.begin(training.optimizers, found)
        rank_zero_info(f"lightning_lowrank: step {training.step}: {table(training.module, state, found)}")

    def end(self) -> None:
        """Take the hooks off the optimizers; the module keeps its factors until they are multiplied out."""
        self.steps.end()

    def forget(self) -> None:
        """The next run is no continuation."""
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """What is not in the weights: samples of a run that is still dense, shares of energy for the table."""
        state = prepared(self.module)
        if state is None:
            return self._loaded or {}
        return {"kept": dict(state.kept), "waiting": self.waiting.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was stopped."""
        self._loaded = state
        own = prepared(self.module)
        if own is not None:
            own.kept |= state.get("kept", {})
        if "waiting" in state:
            self.waiting.load_state_dict(state["waiting"])

    def __getstate__(self) -> dict[str, Any]:
        """A copy acts on a training of its own."""
        return vars(self) | {"module": None}

    def _refuse_deferred(self, training: Training) -> None:
        if training.team.size > 1:
            raise ValueError(
                f"{self.name}: weights are replaced in mid-run, and DDP would not send the gradients of what replaces "
                "them: on several processes give ranks and when='start'"
            )


def exchange(optimizers: Sequence[Optimizer], new: Replaced) -> None:
    """Let optimizers step factors in the place of the weights that they are of, in the same groups, anew."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for old in [p for p in group["params"] if id(p) in new]:
                optimizer.state.pop(old, None)
            group["params"] = [q for p in group["params"] for q in new.get(id(p), [p])]


def refuse_idle(name: str, optimizers: Sequence[Optimizer], found: Sequence[Place]) -> None:
    """Factors that nobody steps.

    Raises:
        ValueError: There is one, named.
    """
    owned = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for place in found:
        if any(p.requires_grad and id(p) not in owned for p in place.parameters):
            raise ValueError(
                f"{name}: no optimizer has the factors of {place.name!r}: give it all that trains in "
                "configure_optimizers, as self.parameters()"
            )


def table(module: nn.Module, state: Prepared, found: Sequence[Place]) -> str:
    """What is factorized, and what that saves."""
    if not found:
        names = [one.name for one in state.choice.wanted]
        left_out = ", ".join(f"{name} ({why})" for name, why in state.choice.left_out.items())
        return f"{len(names)} weights are to be factorized: {', '.join(names[:10])}; left alone: {left_out or 'none'}"
    (number, num_bytes), (number_before, bytes_before) = size(module), state.num_before
    rows = [
        f"{len(found)} weights factorized: the module has {number_before:,} -> {number:,} numbers "
        f"({number / number_before - 1:+.0%}), {bytes_before:,} -> {num_bytes:,} bytes"
    ]
    for place in found:
        left, scale, right = place.factors
        kept = f", {state.kept[place.name]:.0%} of its energy" if place.name in state.kept else ""
        m, n, r = len(left), right.shape[1], len(scale)
        how = "" if place.is_thin else ", computed at each reading"
        rows.append(f"  {place.name}  {m} x {n} at rank {r}  {m * n:,} -> {r * (m + n + 1):,} numbers{kept}{how}")
    gone = {name: why for name, why in state.choice.left_out.items() if name not in {p.name for p in found}}
    left_out = ", ".join(f"{name} ({why})" for name, why in gone.items())
    return "\n".join([*rows, *([f"  left alone: {left_out}"] if left_out else [])])
