"""Rounds of a lottery ticket: train, prune the smallest weights, rewind, and train what is left."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.methods.lottery import rewinding
from lightning_lowrank.methods.lottery.masks import Scope
from lightning_lowrank.methods.lottery.pruning import Pruning
from lightning_lowrank.methods.method import Act
from lightning_lowrank.models.training import Training
from lightning_lowrank.monitors.concentration.alerts import EarlyBirdAlert
from lightning_lowrank.monitors.concentration.tickets import Tickets

# Distance of the newest mask to those of the second half of the round so far, over that to the first.
SETTLED = float(EarlyBirdAlert().below or 0.0)


@dataclass(frozen=True)
class Schedule:
    """Options of the rounds.

    Attributes:
        rounds: Number of rounds; the first trains the whole network.
        length: Length of a round.
        in_epochs: Whether the length is in epochs; otherwise in optimizer steps.
        prune: Share of the remaining weights that is removed between two rounds.
        rewind_step: The step of the first round to which later rounds rewind.
        scope: Scope in which magnitudes are compared.
        look: Steps between two checks whether the mask of the next round has settled, which ends a round; 0 for none.
    """

    rounds: int
    length: int
    in_epochs: bool
    prune: float
    rewind_step: int
    scope: Scope
    look: int = 0

    def __str__(self) -> str:
        unit = "epochs" if self.in_epochs else "steps"
        most = f"{self.rounds * self.length} {unit} in all"
        return f"{self.rounds} rounds of {self.length} {unit}, {most}" + (
            ", or until masks settle" if self.look else ""
        )

    def density(self, rounds: int) -> float:
        """Share of the weights that is left after some prunings."""
        return (1 - self.prune) ** rounds


@dataclass
class Count:
    """The number of values of a training's counter since the first round began, over restarts and second fits.

    Attributes:
        seen: The last value.
        num: The number of values.
    """

    seen: int = -1
    num: int = 0

    def hear(self, value: int) -> None:
        """Note the counter's value at a batch."""
        if value != self.seen:
            self.seen, self.num = value, self.num + 1


@dataclass(eq=False)
class Rounds(Act):
    """Trains, prunes and rewinds.

    Pruned weights are zeros in the module's own parameters, so no key changes. Their gradients are set to zero before
    anything reads them. Changes that an optimizer makes nevertheless are undone after its step.

    Attributes:
        pruning: Chooses what is removed.
        schedule: Options.
        name: Name for messages.
        weights: Weights with masks, by tag.
        masks: Masks of the remaining entries, by tag; empty before the first pruning.
        round: Number of the round, counted from 0.
        frozen: Tags of weights that did not train when the first round began; they are left alone.
    """

    pruning: Pruning
    schedule: Schedule
    name: str = "LotteryTicket"
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    round: int = 0
    frozen: list[str] = field(default_factory=list)
    _steps: Count = field(default_factory=Count)
    _epochs: Count = field(default_factory=Count)
    # Steps and epochs that there were when the round began.
    _began: list[int] = field(default_factory=lambda: [0, 0])
    _search: Tickets = field(default_factory=lambda: Tickets([], seed=0))
    _looked: int = -1
    _has_stepped: bool = False
    _point: dict[str, Any] = field(default_factory=dict)
    _hooks: list[RemovableHandle] = field(default_factory=list)
    _loaded: dict[str, Any] | None = None

    def begin(self, training: Training) -> str:
        """Choose weights and hook the optimizers.

        A second training of the same weights continues with the masks and in the same round.

        Raises:
            ValueError: A pattern matches nothing, epochs are not counted, an optimizer has no hooks, or the resumed run
                had other weights.
        """
        self.end()
        every, left_out = self.pruning.find(training.module)
        if self.schedule.in_epochs and training.epoch is None:
            raise ValueError(f"{self.name}(epochs_per_round=...): your own loop has no epochs; use steps_per_round")
        known = {tag: p for tag, p in every.items() if tag not in self.frozen}
        is_known = known.keys() == self.weights.keys() and all(known[tag] is self.weights[tag] for tag in known)
        if self._loaded is not None:
            self.frozen = list(self._loaded.get("frozen", ()))
        elif not is_known:
            self.frozen = [tag for tag, p in every.items() if not p.requires_grad]
        found = {tag: p for tag, p in every.items() if tag not in self.frozen}
        if not found:
            raise ValueError(
                f"{self.name}: all weights that it could prune are frozen, {self.frozen[:10]}; match weights that train"
            )
        if self._loaded is not None:
            self._resume(found, self._loaded)
        elif is_known:
            self._steps.seen = self._epochs.seen = -1
        else:
            self.masks, self.round, self._point = {}, 0, {}
            self._steps, self._epochs, self._began = Count(), Count(), [0, 0]
            self._looked, self._search = -1, self._new_search()
            self.pruning.forget()
        self.weights, self._loaded = found, None
        self._hooks = [o.register_step_post_hook(self._after_step) for o in training.optimizers]
        return self._table(training.module, {**left_out, **dict.fromkeys(self.frozen, "frozen")})

    def batch_begins(self, training: Training) -> None:
        """Keep the point to which rounds rewind; prune and rewind when a round is over.

        This happens at the start of a batch, so that validation and checkpoints at the end of a round get the trained
        network.
        """
        self._has_stepped = False
        self._steps.hear(training.step)
        self._epochs.hear(-1 if training.epoch is None else training.epoch)
        if not self._point and self._steps.num > self.schedule.rewind_step:
            self._point = rewinding.taken(training)
        if self.round < self.schedule.rounds - 1 and (self._passed() >= self.schedule.length or self._has_settled()):
            self._next_round(training)

    def batch_over(self, training: Training) -> None:
        """End a run with shorter rounds after the last step of the last round."""
        if not self.schedule.in_epochs and self._has_stepped:
            self._stop_after(training, self._passed() + 1)

    def epoch_over(self, training: Training) -> None:
        """The same for rounds of epochs."""
        if self.schedule.in_epochs:
            self._stop_after(training, self._passed() + 1)

    def gradients_final(self, training: Training, optimizer: Optimizer) -> None:
        """Read gradients, then set those of pruned weights to zero; clipping uses the norm of the rest."""
        if self.round < self.schedule.rounds - 1:
            self.pruning.hear(self.weights, {id(p) for group in optimizer.param_groups for p in group["params"]})
        for parameter, mask in self._masked(optimizer):
            if parameter.grad is not None and not parameter.grad.is_sparse:
                parameter.grad.masked_fill_(~mask, 0)

    def end(self) -> None:
        """Remove the hooks; the weights stay pruned."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def forget(self) -> None:
        """The next run has its own rounds, unless it trains the same weights."""
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """Masks, the position in the rounds, and the point to which they rewind."""
        if self._loaded is not None:
            return self._loaded
        return {
            "masks": dict(self.masks),
            "round": self.round,
            "frozen": list(self.frozen),
            "steps": [self._steps.seen, self._steps.num],
            "epochs": [self._epochs.seen, self._epochs.num],
            "began": list(self._began),
            "looked": self._looked,
            "search": self._search.state_dict(),
            "point": dict(self._point),
            "heard": self.pruning.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state until the weights are known."""
        self._loaded = state

    def __getstate__(self) -> dict[str, Any]:
        """A copy acts on a training of its own."""
        return vars(self) | {"weights": {}, "_hooks": []}

    def _new_search(self) -> Tickets:
        return Tickets([self.schedule.density(self.round + 1)], seed=0)

    def density(self) -> float:
        """Share of the units that this round has."""
        return self._num_left(self.round) / self.pruning.num_all(self.weights)

    def _num_left(self, rounds: int) -> int:
        return self.pruning.num_left(self.weights, self.schedule.prune, rounds, self.schedule.scope)

    def _passed(self) -> int:
        """Epochs or steps of this round that are over, at the start of a batch."""
        now = self._epochs.num - self._began[1] if self.schedule.in_epochs else self._steps.num - self._began[0]
        return now - 1

    def _has_settled(self) -> bool:
        """Whether the mask of the next round has, by the rule of `EarlyBirdAlert`. Waits for the device."""
        passed = self._steps.num - self._began[0] - 1
        if not self.schedule.look or passed % self.schedule.look or self._looked == self._steps.num:
            return False
        self._looked = self._steps.num
        found = self._search.compared(self.pruning.compared(self.weights))
        ratio = next((float(value) for name, value in found.items() if "early_bird" in name), torch.nan)
        return ratio < SETTLED

    def _stop_after(self, training: Training, passed: int) -> None:
        last = self.round == self.schedule.rounds - 1
        if self.schedule.look and last and passed >= self.schedule.length:
            training.stop()

    @torch.no_grad()
    def _next_round(self, training: Training) -> None:
        if not self._point:
            self.warn(
                f"{self.name}: the first round ended before step {self.schedule.rewind_step}; later rounds rewind "
                "to its end"
            )
            self._point = rewinding.taken(training)
        self.round += 1
        self._began, self._search = [self._steps.num - 1, self._epochs.num - 1], self._new_search()
        schedule = self.schedule
        self.masks = self.pruning.masks(self.weights, self.masks, schedule.prune, self.round, schedule.scope)
        self.pruning.forget()
        rewinding.rewind(training, self._point)
        for tag, weight in self.weights.items():
            weight.masked_fill_(~self.masks[tag], 0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._has_stepped = True
        for parameter, mask in self._masked(optimizer):
            parameter.masked_fill_(~mask, 0)

    def _masked(self, optimizer: Optimizer) -> list[tuple[nn.Parameter, Tensor]]:
        """Weights of an optimizer that have a mask."""
        known = {id(self.weights[tag]): mask for tag, mask in self.masks.items()}
        owned = (p for group in optimizer.param_groups for p in group["params"])
        return [(p, known[id(p)]) for p in owned if id(p) in known]

    def _resume(self, found: Mapping[str, nn.Parameter], state: Mapping[str, Any]) -> None:
        masks = state["masks"]
        if masks and {tag: p.shape for tag, p in found.items()} != {tag: mask.shape for tag, mask in masks.items()}:
            raise ValueError(
                f"{self.name}: the resumed run pruned {sorted(masks)[:10]}, and this run has {sorted(found)[:10]} "
                "with other names or shapes; give the same match and exclude"
            )
        self.masks = {tag: masks[tag].to(p.device) for tag, p in found.items() if tag in masks}
        self.round, self._point = state["round"], dict(state["point"])
        self._steps, self._epochs = Count(*state["steps"]), Count(*state["epochs"])
        self._began, self._looked, self._search = list(state["began"]), state["looked"], self._new_search()
        self._search.load_state_dict(state["search"])
        self.pruning.load_state_dict(state.get("heard", {}), found)

    def _table(self, module: nn.Module, left_out: Mapping[str, str]) -> str:
        """What may be pruned, and what is kept for it."""
        schedule, total = self.schedule, self.pruning.num_all(self.weights)
        least = self._num_left(schedule.rounds - 1)
        kept_for_it = sum(weight.numel() for weight in self.weights.values()) + rewinding.num_bytes(module)
        head = (
            f"{schedule}; {len(self.weights)} weights, {total:,} -> {least:,} {self.pruning.unit} in the last round "
            f"({least / total:.1%}); the masks and the copy for rewinding take {kept_for_it:,} bytes"
        )
        alone = f"; left alone: {', '.join(f'{tag} ({why})' for tag, why in left_out.items())}" if left_out else ""
        return "\n".join([head + alone, *(f"  {tag}  {tuple(p.shape)}" for tag, p in self.weights.items())])
