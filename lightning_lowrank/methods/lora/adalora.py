"""`AdaLoRA`: LoRA with ranks that peft's allocator distributes during training."""

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
    """The number of remaining directions over the training.

    Attributes:
        total_steps: Steps of the training.
        rank: Mean rank of all pairs at the end.
        initial_rank: Rank of each pair at the start.
        first_steps: Steps at the start without removals.
        last_steps: Steps at the end without removals.
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
        """The step from which ranks are fixed."""
        return self.total_steps - self.last_steps


@dataclass(eq=False)
class Allocation(Adapters):
    """Pairs of peft's AdaLoRA, and its allocator after each step.

    Attributes:
        schedule: The number of remaining directions over the training.
        orthogonality: Weight of the penalty on factors that are not orthonormal.
        steps: Steps so far of the optimizer that has the pairs.
        pattern: Remaining directions, by name of the gains.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(1000, 8, 12, 0, 0, 1))
    orthogonality: float = 0.5
    name: str = "AdaLoRA"
    steps: int = 0
    pattern: dict[str, list[bool]] = field(default_factory=dict)
    _allocator: Any = None

    def begin(self, training: Training) -> str:
        """Also create the allocator, with the state of a resumed run."""
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
        """Add the gradient of the penalty to the gradients of the factors."""
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
        """Also the state of the allocator."""
        kept = {name: dict(getattr(self._allocator, name, {})) for name in KEPT}
        return super().state_dict() | {"steps": self.steps, "pattern": self.pattern} | kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also load the state of the allocator."""
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
    """Curves of `LoRA`, and the number of remaining directions.

    Args:
        act: The act that has the pairs.
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
        """Also a label for the whole model."""
        return [WHOLE_MODEL, *super().labels()]

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Also the remaining directions of each pair, and of all together."""
        left = {label: gains(place.holder)[0].detach().count_nonzero().double() for label, place, *_ in self._pairs()}
        total = torch.stack(list(left.values())).sum()
        found = [Numbers(WHOLE_MODEL, {"adalora_directions": total})]
        for one in super().numbers(team):
            found.append(replace(one, values={**one.values, "adalora_rank": left[one.site]}))
        return found


class AdaLoRA(LoRA):
    """Fine-tune with LoRA and distribute the ranks during training. Each pair is `B diag(e) A`. Entries of e with
    little importance become zero until all pairs together have the requested rank.

    peft creates the pairs and decides: its `RankAllocator` is called after each step of the optimizer, before gradients
    are cleared. With gradient accumulation, it is called on real steps only. The penalty on factors that are not
    orthonormal is added to the gradients, not to the loss. Options that are not described here are those of
    `LoRA(backend="peft")`, and so are the keys. It adapts linear layers and transformers' `Conv1D`.

    `LoRA.merge`, checkpoints and exported folders work as for `LoRA`. A folder is plain LoRA, in which each pair has
    its remaining rank.

    Curves: those of `LoRA`, as `adalora/...`; `adalora_rank` of each pair, which is 0 at the start since e is zero; and
    `adalora/directions`, their sum.

    Cost: that of `LoRA`, and three numbers for each parameter of the pairs, also in checkpoints.

    Args:
        total_steps: Optimizer steps of the training.
        r: Mean rank of the pairs at the end.
        initial_r: Rank of each pair at the start.
        first_steps: Steps at the start during which no direction is removed.
        last_steps: Steps at the end during which no direction is removed.
        every: Steps between two allocations.
        orthogonality: Weight of the penalty.
        alpha: The scaling is alpha over `initial_r`. Default: `initial_r`.
        match: Weights to adapt, as in `LoRA`.
        exclude: Patterns of weights to leave out.
        train_also: Patterns of parameters to train in full.
        dropout: Share of the inputs that the branches drop in training.
        merge_on_save: As in `LoRA`.
        adapter_only: As in `LoRA`.
        seed: Seed for random factors.
        every_n_steps: Optimizer steps between points of the curves.
        detail: What loggers get: "core", "standard" or "all".
        per_site: Curves of single pairs: `True`, `False`, or "auto".
        name: Prefix of all tags.

    Raises:
        ValueError: As `LoRA`, or the schedule has no step for an allocation.

    Examples:
        >>> AdaLoRA(total_steps=1000, first_steps=100, last_steps=300)
        AdaLoRA(total_steps=1000, first_steps=100, last_steps=300)

    References:
        Zhang et al. (2023), AdaLoRA, arXiv:2303.10512. The defaults are those of peft.
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
            raise ValueError(f"orthogonality={orthogonality} must be a number of at least 0")
        if merge_on_save and adapter_only:
            raise ValueError(
                "AdaLoRA(merge_on_save=True, adapter_only=True): give only one; merged weights are no adapter"
            )
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
    """The options as a checked schedule.

    Raises:
        ValueError: A number is out of range, or no step is left for an allocation.
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
            raise ValueError(f"{word}={value!r} must be a whole number of at least {least}")
    if r >= initial_r:
        raise ValueError(f"r={r} must not be larger than initial_r={initial_r}, since AdaLoRA removes directions")
    if first_steps + last_steps >= total_steps:
        raise ValueError(
            f"first_steps={first_steps} and last_steps={last_steps} leave no step in between of "
            f"total_steps={total_steps}"
        )
    return Schedule(total_steps, r, initial_r, first_steps, last_steps, every)
