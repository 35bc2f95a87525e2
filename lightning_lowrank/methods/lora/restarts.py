"""Restarts of low-rank training: pairs are added to the weights and start again, and so does their optimizer state.

Shape letters:  M outputs, N inputs of a layer   R rank of a pair   K directions so far
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lowrank.methods.lora.adapters import Adapters, refuse_idle
from lightning_lowrank.methods.lora.inits import draws, initialise
from lightning_lowrank.methods.lora.pairs import Place, factors, places, wide
from lightning_lowrank.methods.lora.prepared import Factors
from lightning_lowrank.models.training import Training

WAYS = ("zero", "magnitude", "random", "none")


@dataclass(frozen=True)
class Reset:
    """What happens to the state of optimizers at a restart.

    Attributes:
        way: "zero" for all entries, "magnitude" for the smallest, "random", or "none".
        share: Share of the entries that become 0.

    All moments of a parameter lose the same entries. The authors' code chooses them separately for each moment. An
    entry whose first moment stays while its second moment is 0 makes a step of `lr m / eps`.
    """

    way: str
    share: float

    @classmethod
    def of(cls, words: str) -> "Reset":
        """The reset that the user's words request, such as "magnitude:0.9".

        Raises:
            ValueError: The words are invalid.
        """
        way, _, number = words.partition(":")
        try:
            share = float(number) if way in ("magnitude", "random") else {"zero": 1.0, "none": 0.0}[words]
        except (ValueError, KeyError):
            share = math.nan
        if way not in WAYS or not (words == "none" or 0 < share <= 1):
            raise ValueError(
                f'reset={words!r} must be "zero", "magnitude:0.9", "random:0.999" (shares up to 1), or "none"'
            )
        return cls(way, share)

    @torch.no_grad()
    def __call__(self, state: dict[str, Any], parameter: Tensor, generator: torch.Generator) -> tuple[int, int]:
        """The number of entries in the moments of a parameter that were set to 0, and their total number. Magnitudes
        are those of the optimizer's first moment; for Adam, this is the mean of gradients.
        """
        moments = [t for t in state.values() if isinstance(t, Tensor) and t.shape == parameter.shape and t.ndim > 0]
        if self.way == "zero" and "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0
        count = round(self.share * parameter.numel())
        if not moments or not count:
            return 0, parameter.numel() * len(moments)
        if self.way == "random":
            chosen = torch.randperm(parameter.numel(), generator=generator)[:count].to(parameter.device)
        else:  # of equal ones the first, so that the share is as asked
            chosen = moments[0].abs().flatten().argsort(stable=True)[:count]
        for moment in moments:
            moment.view(-1)[chosen] = 0
        return count * len(moments), parameter.numel() * len(moments)


@dataclass(eq=False)
class Restarts(Adapters):
    """LoRA whose pairs are added to the weights every so many steps.

    Attributes:
        every: Steps between two restarts.
        rewarm: Steps after a restart during which learning rates rise to their values.
        reset: What happens to the state of optimizers.
        warm_start_steps: Steps at the start during which the weights train instead of the pairs.
        steps: Steps so far of the optimizer that has the pairs.
        cycle: Number of restarts so far.
        restarted_at: Steps at the last restart.
        share: Share of the optimizer state that the last restart set to 0.
        added: Factors of everything that was added to the weights, by weight and part.
        bases: Output directions of the last cycle, by weight and part.
        overlap: Overlap of the last two cycles, by weight and part.
    """

    every: int = 1000
    rewarm: int = 100
    reset: Reset = field(default_factory=lambda: Reset("zero", 1.0))
    warm_start_steps: int = 0
    name: str = "ReLoRA"
    steps: int = 0
    cycle: int = 0
    restarted_at: int = 0
    share: float = math.nan
    added: dict[str, Factors] = field(default_factory=dict)
    bases: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    overlap: dict[str, dict[str, float]] = field(default_factory=dict)
    _checked: int = 0

    @property
    def warms_up(self) -> bool:
        """Whether the weights still train instead of the pairs."""
        return self.steps < self.warm_start_steps

    @property
    def changes_rates(self) -> bool:
        """Also after a restart."""
        return self.rewarm > 0 or super().changes_rates

    def factor(self, parameter: Tensor) -> float:
        """Also the factor of the rise after a restart."""
        since = self.steps - self.restarted_at + 1
        rise = min(1.0, since / self.rewarm) if self.rewarm and self.restarted_at else 1.0
        return rise * super().factor(parameter)

    def prepare(self, module: nn.Module, *, fresh: bool = True) -> None:
        """Also give the weights that train first to optimizers."""
        super().prepare(module, fresh=fresh)
        if self.warm_start_steps:
            for place in places(module):
                _set_training(place, weight=True, pairs=True)

    def begin(self, training: Training) -> str:
        """Also reset everything if the run is not a continuation."""
        if self._loaded is None:
            self.steps = self.cycle = self.restarted_at = self._checked = 0
            self.share, self.added, self.bases, self.overlap = math.nan, {}, {}, {}
        if self.warm_start_steps and training.team.size > 1:
            raise ValueError(
                "ReLoRA(warm_start_steps=...): DDP cannot change which parameters train; train the warm start in a "
                "separate fit"
            )
        for place in places(training.module) if self.warm_start_steps else ():
            _set_training(place, weight=self.warms_up, pairs=not self.warms_up)
        return super().begin(training)

    def _refuse(self, training: Training, found: Sequence[Place]) -> None:
        refuse_lbfgs = [type(o).__name__ for o in training.optimizers if isinstance(o, torch.optim.LBFGS)]
        if refuse_lbfgs:
            raise ValueError(
                "ReLoRA: LBFGS has one learning rate and no state for single parameters; use AdamW or a similar "
                "optimizer"
            )
        if not self.warms_up:
            refuse_idle(self.name, training, found)

    def batch_over(self, training: Training) -> None:
        """Restart if this is due."""
        if self.steps == self._checked or not self._hooks:
            return
        self._checked = self.steps
        since = self.steps - self.warm_start_steps
        if since == 0 and self.warm_start_steps:
            self._leave_warm_start(training)
        elif since > 0 and since % self.every == 0:
            self.restart(training)

    @torch.no_grad()
    def restart(self, training: Training) -> None:
        """Add pairs to the weights, draw new ones, and reset the optimizer state of the old ones. The function stays
        the same.
        """
        self.cycle, self.restarted_at = self.cycle + 1, self.steps
        zeroed = total = 0
        for place in places(training.module):
            self._remember(place)
            place.add()
            generator = draws(self.settings.seed, place.name, self.cycle)
            initialise(place, "default", generator)
            for parameter in (p for pair in factors(place.holder).values() for p in pair):
                for optimizer in training.optimizers:
                    if parameter in optimizer.state:
                        some, of = self.reset(optimizer.state[parameter], parameter, generator)
                        zeroed, total = zeroed + some, total + of
        self.share = zeroed / total if total else math.nan

    def beside(self, name: str, part: str) -> tuple[Tensor, Tensor] | None:
        """Everything that was added to the weight so far."""
        kept = self.added.get(name, {}).get(part)
        return None if kept is None else (kept[0], kept[1])

    def state_dict(self) -> dict[str, Any]:
        """Also the position in the cycles."""
        numbers = {"steps": self.steps, "cycle": self.cycle, "restarted_at": self.restarted_at, "share": self.share}
        kept = {"added": self.added, "bases": self.bases, "overlap": self.overlap}
        return super().state_dict() | numbers | kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also load the position in the cycles."""
        super().load_state_dict(state)
        for name in ("steps", "cycle", "restarted_at", "share", "added", "bases", "overlap") if state else ():
            setattr(self, name, state[name])
        self._checked = self.steps

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        """Count its steps."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self._seconds & owned:
            self.steps += 1
        if not self.warms_up:
            super()._look(optimizer)

    def _leave_warm_start(self, training: Training) -> None:
        self.restarted_at = self.steps
        for place in places(training.module):
            _set_training(place, weight=False, pairs=True)
            place.weight.grad = None
            for optimizer in training.optimizers:
                optimizer.state.pop(place.weight, None)

    def _remember(self, place: Place) -> None:
        """Add to what went into the weight, and compare with the last cycle."""
        added, bases = self.added.setdefault(place.name, {}), self.bases.setdefault(place.name, {})
        for part, (a, b) in factors(place.holder).items():
            first, second = wide(a).flatten(1).cpu(), wide(b).cpu()
            before = added.get(part, [first[:0], second[:, :0]])
            added[part] = list(_bounded(torch.cat([before[0], first]), torch.cat([before[1], second], 1)))
            basis = torch.linalg.qr(second)[0]
            if part in bases:
                common = (bases[part].mT @ basis).square().sum().item() / basis.shape[1]
                self.overlap.setdefault(place.name, {})[part] = common
            bases[part] = basis


def _set_training(place: Place, *, weight: bool, pairs: bool) -> None:
    place.weight.requires_grad_(weight)
    for parameter in (p for pair in factors(place.holder).values() for p in pair):
        parameter.requires_grad_(pairs)


def _bounded(a: Float[Tensor, "K N"], b: Float[Tensor, "M K"]) -> tuple[Float[Tensor, "L N"], Float[Tensor, "M L"]]:
    """The same product of no more directions than it can have."""
    most = min(a.shape[1], len(b))
    if len(a) <= most:
        return a, b
    u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
    return s[:, None] * vt, u
