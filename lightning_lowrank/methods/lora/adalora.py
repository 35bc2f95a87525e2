"""`AdaLoRA`: LoRA whose ranks are shared out while it trains, by peft's allocator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Detail, Numbers, Quantity
from lightning_lowrank.methods.lora.adapters import Adapters
from lightning_lowrank.methods.lora.callback import LoRA, settings_of
from lightning_lowrank.methods.lora.curves import LoRANumbers
from lightning_lowrank.methods.lora.pairs import ADAPTER, factors, gains, learned, places, wide
from lightning_lowrank.methods.method import Method
from lightning_lowrank.models.training import Training

# What the allocator keeps of each entry of the pairs.
KEPT = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@dataclass(frozen=True)
class Schedule:
    """When how many directions are left.

    Attributes:
        total_steps: Of the training.
        rank: Mean of all pairs at the end.
        initial_rank: Of each pair at the start.
        first_steps: In which nothing is taken away.
        last_steps: In which nothing is taken away any more.
        every: Steps between two allocations.
    """

    total_steps: int
    rank: int
    initial_rank: int
    first_steps: int
    last_steps: int
    every: int

    @property
    def ends(self) -> int:
        """The step at which ranks are what they stay."""
        return self.total_steps - self.last_steps


@dataclass(eq=False)
class Allocation(Adapters):
    """Pairs by peft's AdaLoRA, and its allocator after each step.

    Attributes:
        schedule: When how many directions are left.
        orthogonality: Weight of the penalty on factors that are not orthonormal.
        steps: So far, of the optimizer that has the pairs.
        pattern: By name of the gains, which directions are left.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(1000, 8, 12, 0, 0, 1))
    orthogonality: float = 0.5
    name: str = "AdaLoRA"
    steps: int = 0
    pattern: dict[str, list[bool]] = field(default_factory=dict)
    _allocator: Any = None

    def begin(self, training: Training) -> str:
        """Also make the allocator, in the state of a run that is resumed."""
        from peft import AdaLoraConfig
        from peft.tuners.adalora.layer import RankAllocator

        if self._loaded is None:
            self.steps, self.pattern = 0, {}
        told, plan = super().begin(training), self.schedule
        config: Any = AdaLoraConfig(
            target_r=plan.rank,
            init_r=plan.initial_rank,
            tinit=plan.first_steps,
            tfinal=plan.last_steps,
            deltaT=plan.every,
            total_step=plan.total_steps,
        )
        make: Any = RankAllocator
        self._allocator = make(training.module, config, ADAPTER)
        for name in KEPT:
            setattr(self._allocator, name, dict((self._loaded or {}).get(name, {})))
        return told

    def gradients_final(self, training: Training, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty to those of the factors."""
        if self.orthogonality and self._owns(optimizer):
            several = [p for place in places(training.module) for p in next(iter(factors(place.holder).values()))]
            for parameter, slope in zip(several, slopes(several), strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(slope.to(parameter.grad), alpha=self.orthogonality)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        """After a step: take directions away, as peft does between the step and `zero_grad`."""
        super()._look(optimizer)
        if self._owns(optimizer):
            self._allocate()
            self.steps += 1

    def _owns(self, optimizer: Optimizer) -> bool:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return bool(self._seconds & owned)

    def _allocate(self) -> None:
        """What `AdaLoraModel.update_and_allocate` does at each step."""
        module, ends = self.module, self.schedule.ends
        assert module is not None
        if self.steps > ends:
            self._allocator.mask_using_rank_pattern(module, self.pattern)
            return
        if any(p.grad is None for place in places(module) for p in learned(place.holder)):
            return  # a layer that was not called, which is named
        _, pattern = self._allocator.update_and_allocate(module, self.steps, force_mask=self.steps == ends)
        self.pattern = pattern or self.pattern

    def state_dict(self) -> dict[str, Any]:
        """Also what the allocator knows."""
        kept = {name: dict(getattr(self._allocator, name, {})) for name in KEPT}
        return super().state_dict() | {"steps": self.steps, "pattern": self.pattern} | kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also go on there."""
        super().load_state_dict(state)
        self.steps, self.pattern = state.get("steps", 0), dict(state.get("pattern", {}))

    def __getstate__(self) -> dict[str, Any]:
        """A copy acts on a training of its own."""
        return super().__getstate__() | {"_allocator": None}


def slopes(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of the mean of `||A A^T - 1||` and `||B^T B - 1||`, of factors in turn."""
    found = []
    for i, parameter in enumerate(parameters):
        factor = wide(parameter.detach()) if i % 2 == 0 else wide(parameter.detach()).mT
        off = factor @ factor.mT - torch.eye(len(factor)).to(factor)
        slope = 2 * off @ factor / off.norm().clamp(min=torch.finfo(off.dtype).tiny) / len(parameters)
        found.append(slope if i % 2 == 0 else slope.mT)
    return found


class AdaLoRANumbers(LoRANumbers):
    """What `LoRA` reports, and how many directions are left.

    Args:
        act: Whose pairs they are.
    """

    name = "adalora"

    def __init__(self, act: Allocation) -> None:
        super().__init__(act)
        self.quantities = [
            *self.quantities,
            Quantity("adalora_rank", "directions", per_site=True),
            Quantity("adalora_directions", "directions", detail="core"),
        ]

    def labels(self) -> list[str]:
        """Also the whole model."""
        return [WHOLE_MODEL, *super().labels()]

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Also what is left of each pair, and of all together."""
        left = {label: gains(place.holder)[0].detach().count_nonzero().double() for label, place, *_ in self._pairs()}
        total = torch.stack(list(left.values())).sum()
        found = [Numbers(WHOLE_MODEL, {"adalora_directions": total})]
        for one in super().numbers(team):
            found.append(replace(one, values={**one.values, "adalora_rank": left[one.site]}))
        return found


class AdaLoRA(LoRA):
    """Fine-tunes with LoRA whose ranks are shared out in training: pairs are `B diag(e) A`, and entries of e that
    matter little become zero, until all pairs together have the rank that was asked for.

    peft makes the pairs and decides: its `RankAllocator` is called after each step of the optimizer, before gradients
    are cleared, on real steps alone where gradients are accumulated. What the penalty on factors that are not
    orthonormal adds to gradients is added to them, not to the loss. The options that are not named here are those of
    `LoRA(backend="peft")`, whose keys it has too; linear layers and transformers' `Conv1D` are adapted.

    `LoRA.merge`, checkpoints and exported folders are those of `LoRA`. A folder is plain LoRA, each pair of the rank
    that is left to it.

    Writes what `LoRA` does, as `adalora/...`, and `adalora_rank` of each pair (the start counts none: e is zero), and
    `adalora/directions`, of all together.

    Cost: beside that of `LoRA`, three numbers for each of the pairs', also in checkpoints.

    Args:
        total_steps: Optimizer steps of the training.
        r: Mean rank of the pairs at the end.
        initial_r: Rank of each pair at the start.
        first_steps: Steps at the start in which nothing is taken away.
        last_steps: Steps at the end in which nothing is taken away any more.
        every: Steps between two allocations.
        orthogonality: Weight of the penalty.
        alpha: The scaling is alpha over `initial_r`; that of `initial_r` itself unless given.
        match: Weights that are adapted; as in `LoRA`.
        exclude: The same, taken away.
        train_also: Parameters that train whole.
        dropout: Share of the inputs that the branches do not see in training.
        merge_on_save: As in `LoRA`.
        adapter_only: As in `LoRA`.
        seed: Of what is drawn.
        every_n_steps: Cadence of the curves, in optimizer steps.
        detail: What loggers get: "core", "standard" or "all".
        per_site: Scalars of single pairs: `True`, `False`, or "auto".
        name: Prefix of all tags.

    Raises:
        ValueError: As `LoRA`; the schedule has no room for an allocation.

    Examples:
        >>> AdaLoRA(total_steps=1000, first_steps=100, last_steps=300)
        AdaLoRA(total_steps=1000, first_steps=100, last_steps=300)

    References:
        Zhang et al. (2023), AdaLoRA, arXiv:2303.10512, whose defaults in peft these are.
    """

    word = "adalora"

    def __init__(
        self,
        total_steps: int,
        r: int = 8,
        initial_r: int = 12,
        first_steps: int = 0,
        last_steps: int = 0,
        every: int = 1,
        orthogonality: int | float = 0.5,
        alpha: int | float | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        train_also: str | Sequence[str] = (),
        dropout: float = 0.0,
        merge_on_save: bool = False,
        adapter_only: bool = False,
        *,
        seed: int = 0,
        every_n_steps: int = 50,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
    ) -> None:
        schedule = schedule_of(total_steps, r, initial_r, first_steps, last_steps, every)
        if not 0 <= orthogonality < float("inf"):
            raise ValueError(f"orthogonality={orthogonality}: a weight from 0 on")
        if merge_on_save and adapter_only:
            raise ValueError("AdaLoRA(merge_on_save=True, adapter_only=True): give one; merged weights are whole ones")
        settings = settings_of(
            initial_r, alpha, "default", match, exclude, train_also, False, dropout, seed, backend="peft"
        )
        saved = "merged" if merge_on_save else "adapters" if adapter_only else "whole"
        act = Allocation(
            replace(settings, is_allocated=True), saved=saved, schedule=schedule, orthogonality=float(orthogonality)
        )
        Method.__init__(
            self, act, AdaLoRANumbers(act), every_n_steps, detail=detail, per_site=per_site, seed=seed, name=name
        )


def schedule_of(total_steps: int, r: int, initial_r: int, first_steps: int, last_steps: int, every: int) -> Schedule:
    """What was asked for.

    Raises:
        ValueError: It is out of its range, or leaves no step for an allocation.
    """
    numbers: Mapping[str, tuple[int, int]] = {
        "total_steps": (total_steps, 1),
        "r": (r, 1),
        "initial_r": (initial_r, 1),
        "first_steps": (first_steps, 0),
        "last_steps": (last_steps, 0),
        "every": (every, 1),
    }
    for word, (value, least) in numbers.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{word}={value!r}: a whole number from {least} on")
    if r >= initial_r:
        raise ValueError(f"r={r}, initial_r={initial_r}: directions are taken away, so that r is the smaller one")
    if first_steps + last_steps >= total_steps:
        raise ValueError(
            f"first_steps={first_steps} and last_steps={last_steps} leave none of total_steps={total_steps} in between"
        )
    return Schedule(total_steps, r, initial_r, first_steps, last_steps, every)
