"""`LowRankFactorize` as an act on a training: when weights become factors, and which optimizer steps them."""

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
    """Replaces weights by factors, before there are optimizers or during training, and steps them.

    Attributes:
        settings: Options.
        steps: What happens to the factors in each step.
        waiting: Decides when to factorize, and measures ranks.
        module: The module that was prepared last.
    """

    settings: Settings
    steps: OrthogonalSteps
    waiting: Waiting
    name: str = "LowRankFactorize"
    structural = True
    module: nn.Module | None = None
    _loaded: dict[str, Any] | None = None

    def prepare(self, module: nn.Module, *, fresh: bool = True) -> None:
        """Choose weights. Replace them now, unless this happens later or a checkpoint decides."""
        self.module, before = module, prepared(module)
        if before is not None:
            if before.settings != self.settings:
                raise ValueError(
                    f"{self.name}: the module is already factorized with other settings: {before.settings} instead "
                    f"of {self.settings}. First call LowRankFactorize.densify(module)"
                )
            return
        state = Prepared(self.settings, chosen(module, self.settings), size(module))
        if fresh:
            self._convert(state)
        module.__dict__["factorize_prepared"] = state
        module.register_load_state_dict_pre_hook(restructure)

    def settle(self, module: nn.Module) -> None:
        """Replace weights of a module before training. A checkpoint that is loaded later may change ranks.

        Raises:
            ValueError: Factors would not be smaller than the weights.
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
            raise ValueError(
                f"{self.name}: factors of {ranks} would not be smaller than the weights; choose a smaller rank"
            )
        state.convert(ranks)

    def begin(self, training: Training) -> str:
        """Refuse factors that would not train, and hook the optimizers."""
        self.end()
        state = prepared(training.module)
        if state is None:
            raise ValueError(
                f"{self.name}: the module has no factors; call .prepare(model) before you create its optimizer"
            )
        self.module = training.module
        if self.settings.is_deferred:
            self._refuse_deferred(training)
            exchange(training.optimizers, state.convert_waiting())
        found = places(training.module)
        if not found and not self.settings.is_deferred:
            raise ValueError(
                f"{self.name}: the checkpoint is from a run without factors; load its weights into the module first "
                "and start a new run"
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
        """Take a sample, and factorize if it decides so."""
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
        """Remove the hooks of the optimizers. The module keeps its factors until they are multiplied out."""
        self.steps.end()

    def forget(self) -> None:
        """The next run does not continue this one."""
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """State outside of the weights: samples of a dense run, and shares of energy for the table."""
        state = prepared(self.module)
        if state is None:
            return self._loaded or {}
        return {"kept": dict(state.kept), "waiting": self.waiting.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a stopped run."""
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
                f"{self.name}: the weights would be replaced during training, and DDP would not synchronise "
                "gradients of the factors. With several processes, give ranks and when='start'"
            )


def exchange(optimizers: Sequence[Optimizer], new: Replaced) -> None:
    """Let optimizers step factors instead of their weights, in the same groups and with new state."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for old in [p for p in group["params"] if id(p) in new]:
                optimizer.state.pop(old, None)
            group["params"] = [q for p in group["params"] for q in new.get(id(p), [p])]


def refuse_idle(name: str, optimizers: Sequence[Optimizer], found: Sequence[Place]) -> None:
    """Refuse factors that no optimizer steps.

    Raises:
        ValueError: There is one; the message names it.
    """
    owned = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for place in found:
        if any(p.requires_grad and id(p) not in owned for p in place.parameters):
            raise ValueError(
                f"{name}: no optimizer has the factors of {place.name!r}; in configure_optimizers, pass all "
                "trainable parameters, such as self.parameters()"
            )


def table(module: nn.Module, state: Prepared, found: Sequence[Place]) -> str:
    """A table of what is factorized, and what it saves."""
    if not found:
        names = [one.name for one in state.choice.wanted]
        left_out = ", ".join(f"{name} ({why})" for name, why in state.choice.left_out.items())
        return f"{len(names)} weights will be factorized: {', '.join(names[:10])}; left alone: {left_out or 'none'}"
    (number, num_bytes), (number_before, bytes_before) = size(module), state.num_before
    rows = [
        (
            f"{len(found)} weights factorized; size of the module: {number_before:,} -> {number:,} parameters "
            f"({number / number_before - 1:+.0%}), {bytes_before:,} -> {num_bytes:,} bytes"
        )
    ]
    for place in found:
        left, scale, right = place.factors
        kept = f", keeps {state.kept[place.name]:.0%} of its energy" if place.name in state.kept else ""
        m, n, r = len(left), right.shape[1], len(scale)
        how = "" if place.is_thin else ", computed at each access"
        rows.append(f"  {place.name}  {m} x {n} at rank {r}  {m * n:,} -> {r * (m + n + 1):,} parameters{kept}{how}")
    gone = {name: why for name, why in state.choice.left_out.items() if name not in {p.name for p in found}}
    left_out = ", ".join(f"{name} ({why})" for name, why in gone.items())
    return "\n".join([*rows, *([f"  left alone: {left_out}"] if left_out else [])])
