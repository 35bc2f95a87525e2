"""LoRA as an act on a training: pairs on layers, everything else frozen except what is named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.methods.lora.by_peft import initialise_by_peft, inject
from lightning_lowrank.methods.lora.choice import Settings, chosen
from lightning_lowrank.methods.lora.inits import draws, initialise, takes_from_weight
from lightning_lowrank.methods.lora.pairs import Place, attach, factors, learned, places, share, wide
from lightning_lowrank.methods.lora.prepared import (
    Prepared,
    complete,
    copied,
    frozen_keys,
    named,
    prepared,
    put,
    same,
    take_out,
)
from lightning_lowrank.methods.method import Act
from lightning_lowrank.methods.rates import StepRates
from lightning_lowrank.models.names import tag
from lightning_lowrank.models.training import Training

# Bases whose norms differ by more are different ones.
SAME = 1e-4


@dataclass(eq=False)
class Adapters(Act):
    """Gives layers pairs, trains them and the named parameters, and can continue a run.

    Attributes:
        settings: Options.
        ratio: Learning rate of second factors divided by that of first factors.
        saved: Content of checkpoints: "whole" modules, "adapters", or "merged" weights.
        module: The module that was prepared last.
    """

    settings: Settings
    ratio: int | float | None = None
    saved: str = "whole"
    name: str = "LoRA"
    structural = True
    module: nn.Module | None = None
    _seconds: set[int] = field(default_factory=set)
    _seen: set[int] = field(default_factory=set)
    _hooks: list[RemovableHandle] = field(default_factory=list)
    _rates: StepRates | None = None
    _loaded: dict[str, Any] | None = None

    def prepare(self, module: nn.Module, *, fresh: bool = True) -> None:
        """Give layers pairs and freeze the rest, unless this has been done.

        Raises:
            ValueError: A weight cannot be adapted, or the module is adapted with other settings.
        """
        self.module, before = module, prepared(module)
        if before is not None:
            if before.settings != self.settings:
                raise ValueError(
                    f"{self.name}: the module is already adapted with other settings: {before.settings} instead of "
                    f"{self.settings}. First call LoRA.merge(module)"
                )
            return
        choice = chosen(module, self.settings)
        flags = {name: p.requires_grad for name, p in module.named_parameters()}
        for one in () if self.settings.by_peft else choice.adapted:
            first, *others = one.owners
            holder = attach(first.layer, first.local, one.recipe, one.order)
            for other in others:
                share(other.layer, holder)
        state = module.__dict__["lora_prepared"] = Prepared(self.settings, choice)
        if self.settings.by_peft:
            inject(module, state)
        for place in places(module):
            state.norms[place.name] = wide(place.weight.detach()).norm().item()
        self._freeze(module, state, flags)
        module.register_load_state_dict_pre_hook(complete)
        if fresh:
            self._settle(module, state)

    def _settle(self, module: nn.Module, state: Prepared) -> None:
        for place in places(module):
            begin = initialise_by_peft if self.settings.by_peft else initialise
            begin(place, self.settings.init, draws(self.settings.seed, place.name))
            if takes_from_weight(self.settings.init) and not place.holder.lora_waits:
                state.initial[place.name] = copied(place.holder)
        state.settled = True

    def _freeze(self, module: nn.Module, state: Prepared, flags: Mapping[str, bool]) -> None:
        bases = {id(place.weight) for place in places(module)}
        pairs = {id(p) for place in places(module) for p in learned(place.holder)}
        wanted = state.choice.trained
        for name, parameter in named(module).items():
            if parameter.is_floating_point() and id(parameter) not in pairs:
                parameter.requires_grad_(name in wanted and id(parameter) not in bases)
        state.frozen = frozenset(name for name in flags if flags[name] and name not in wanted)
        state.thawed = frozenset(name for name in wanted if not flags[name])

    def begin(self, training: Training) -> str:
        """Refuse pairs that would not train, and hook the optimizers."""
        self.end()
        state = prepared(training.module)
        if state is None:
            raise ValueError(
                f"{self.name}: the module has no pairs; call {self.name.lower()}.prepare(model) before you create "
                "its optimizer"
            )
        self.module = training.module
        if state.bare and not (self._loaded or {}).get("factors"):
            raise ValueError(
                f"{self.name}: the checkpoint is from a run without pairs; load its weights into the module first "
                "and start a new run"
            )
        state.bare = False
        if not state.settled:
            self._settle(training.module, state)
        found = places(training.module)
        self._refuse(training, found)
        self._warn(training.module, state)
        self._seconds = {id(b) for place in found for _, b in factors(place.holder).values()}
        optimizers = list(training.optimizers)
        if self.changes_rates:
            refuse_lbfgs(self.name, optimizers)
            self._rates = StepRates(self.factor)
            self._rates.begin(optimizers)
        self._seen = set()
        self._hooks = [optimizer.register_step_post_hook(self._look) for optimizer in optimizers]
        return self._table(training.module, state, found)

    @property
    def changes_rates(self) -> bool:
        """Whether a learning rate differs from that of its group."""
        return self.ratio is not None

    def _refuse(self, training: Training, found: Sequence[Place]) -> None:
        refuse_idle(self.name, training, found)

    def factor(self, parameter: Tensor) -> float:
        """Factor of the learning rate of a parameter."""
        return float(self.ratio) if self.ratio is not None and id(parameter) in self._seconds else 1.0

    def beside(self, name: str, part: str) -> tuple[Tensor, Tensor] | None:
        """Factors of the change of a pretrained weight apart from the current product: minus the part that was
        subtracted from it.
        """
        state = prepared(self.module)
        taken = state.initial.get(name) if state is not None else None
        return None if taken is None else (-taken[part][0], taken[part][1])

    def end(self) -> None:
        """Remove the hooks of the optimizers. The module keeps its pairs until they are merged."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._rates is not None:
            self._rates.end()
        self._rates = None

    def forget(self) -> None:
        """The next run does not continue this one."""
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """State outside of the weights: subtracted factors, norms of the base, and layers that wait for inputs."""
        state = prepared(self.module)
        if state is None or self.module is None:
            return self._loaded or {}
        found = places(self.module)
        kept = {
            "is_whole": self.saved == "whole",
            "initial": state.initial,
            "norms": state.norms,
            "scalings": {place.name: place.recipe.scaling for place in found},
            "waiting": {place.name: bool(place.holder.lora_waits) for place in found},
        }
        return kept | ({"factors": {p.name: copied(p.holder) for p in found}} if self.saved == "merged" else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a stopped run, after its weights were loaded."""
        self._loaded = state
        own = prepared(self.module)
        if own is None or self.module is None or not state:
            return
        found = {place.name: place for place in places(self.module)}
        if set(found) != set(state["norms"]):
            raise ValueError(
                f"{self.name}: the resumed run adapted {sorted(state['norms'])[:10]}, and this run adapts "
                f"{sorted(found)[:10]}; give the same match and exclude"
            )
        self._refuse_scalings(found, state.get("scalings", {}))
        if not state["is_whole"]:
            self._refuse_base(own.norms, state["norms"])
            for name, place in found.items():
                before, after = own.initial.get(name), state["initial"].get(name)
                if not own.with_base and not same(before, after):
                    take_out(place, before, after)
                put(place, state.get("factors", {}).get(name))
        own.initial, own.norms, own.settled = state["initial"], state["norms"], True
        for name, place in found.items():
            place.holder.lora_waits = state["waiting"][name]

    def __getstate__(self) -> dict[str, Any]:
        """A copy acts on a training of its own."""
        return vars(self) | {"module": None, "_seconds": set(), "_seen": set(), "_hooks": [], "_rates": None}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        """After its first step: a pair that the loss does not reach is named."""
        if id(optimizer) in self._seen:
            return
        self._seen.add(id(optimizer))
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        idle = [
            place.name
            for place in places(self.module or nn.Module())
            if all(id(p) in stepped and p.grad is None for p in learned(place.holder))
        ]
        if idle:
            rank_zero_warn(
                f"lightning_lowrank {self.name}: the pairs of {idle[:10]} get no gradient, because their layers "
                "were not called; exclude them. Under DDP they need strategy='ddp_find_unused_parameters_true'."
            )

    def _refuse_scalings(self, found: Mapping[str, Place], given: Mapping[str, float]) -> None:
        for name, scaling in given.items():
            if found[name].recipe.scaling != scaling:
                raise ValueError(
                    f"{self.name}: the pairs of {name!r} were trained with the scaling {scaling:.6g}, and now it is "
                    f"{found[name].recipe.scaling:.6g}, which would change the function; give the same alpha, r and "
                    "rslora"
                )

    def _refuse_base(self, own: Mapping[str, float], given: Mapping[str, float]) -> None:
        for name, norm in own.items():
            if abs(norm - given[name]) > SAME * given[name]:
                raise ValueError(
                    f"{self.name}: the pairs of {name!r} were trained on another base weight: its norm was "
                    f"{given[name]:.6g}, and now it is {norm:.6g}"
                )

    def _warn(self, module: nn.Module, state: Prepared) -> None:
        pairs = {id(p) for place in places(module) for p in learned(place.holder)}
        known = state.choice.trained
        pairs |= {id(place.weight) for place in places(module)}
        new = [n for n, p in named(module).items() if p.requires_grad and id(p) not in pairs and n not in known]
        if new:
            rank_zero_warn(
                f"lightning_lowrank {self.name}: {new[:10]} also train, since they were created or unfrozen after "
                "LoRA froze the rest"
            )
        head = state.choice.head
        if head is not None and head not in known and state.choice.left_out.get(tag(head)) == "head":
            rank_zero_warn(
                f"lightning_lowrank {self.name}: the head {head!r} was frozen before and stays so; to train it, "
                f"give train_also={head!r}"
            )

    def _table(self, module: nn.Module, state: Prepared, found: Sequence[Place]) -> str:
        """What is adapted, trained and frozen."""
        pairs = {id(p): p for place in found for p in learned(place.holder)}
        others = {name: p for name, p in named(module).items() if id(p) not in pairs}
        whole = {name: p for name, p in others.items() if p.requires_grad}
        frozen = [p for name, p in others.items() if name not in whole]
        rows = [
            f"{len(found)} weights adapted: {_size(pairs.values())}",
            f"  trained in full: {_size(whole.values())}{_some(whole)}",
            f"  frozen: {_size(frozen)}",
        ]
        if self.saved == "adapters":
            kept = [t for key, t in module.state_dict().items() if key not in frozen_keys(module)]
            rows.append(f"  saved in a checkpoint: {_size(kept)}")
        for place in found:
            recipe = place.recipe
            shapes = " + ".join(f"{part or ''}{rows} x {recipe.rank}" for part, rows in recipe.parts)
            how = "" if recipe.kind != "direct" else ", added to its weight at each access"
            rows.append(f"  {place.name}  {tuple(place.weight.shape)}  {shapes}, scaling {recipe.scaling:.3g}{how}")
        left = ", ".join(f"{name} ({why})" for name, why in state.choice.left_out.items())
        return "\n".join([*rows, *([f"  left alone: {left}"] if left else [])])


def refuse_lbfgs(name: str, optimizers: Sequence[Optimizer]) -> None:
    """Refuse an optimizer that treats all parameters as a single vector.

    Raises:
        ValueError: There is one.
    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise ValueError(
            f"{name}: LBFGS has one learning rate and no state for single parameters; use AdamW, SGD or a similar "
            "optimizer"
        )


def refuse_idle(name: str, training: Training, found: Sequence[Place]) -> None:
    """Refuse, before training, pairs that cannot learn, bases that would, and optimizers with nothing to do.

    Raises:
        ValueError: There is one; the message names it.
    """
    owned = {id(p) for o in training.optimizers for group in o.param_groups for p in group["params"]}
    for place in found:
        pairs = learned(place.holder)
        if place.weight.requires_grad:
            raise ValueError(
                f"{name}: the base weight {place.key!r} is not frozen; something has set its requires_grad again"
            )
        if not all(p.requires_grad for p in pairs):
            raise ValueError(f"{name}: the pairs of {place.name!r} are frozen; something has frozen the whole module")
        if not all(id(p) in owned for p in pairs):
            raise ValueError(
                f"{name}: no optimizer has the pairs of {place.name!r}; in configure_optimizers, pass all trainable "
                "parameters, such as self.parameters()"
            )
        if all(not a.any() and not b.any() for a, b in factors(place.holder).values()):
            raise ValueError(f"{name}: both factors of {place.name!r} are zero, so their gradients will always be zero")
    names = {id(p): key for key, p in training.module.named_parameters()}
    for optimizer in training.optimizers:
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p.requires_grad for p in stepped):
            some = [names.get(id(p), "?") for p in stepped][:10]
            raise ValueError(
                f"{name}: {type(optimizer).__name__} has only frozen parameters, {some}; to train some of them, "
                "give train_also=..."
            )


def _size(tensors: Any) -> str:
    several = list(tensors)
    number, size = sum(t.numel() for t in several), sum(t.numel() * t.element_size() for t in several)
    return f"{number:,} parameters, {size:,} bytes"


def _some(names: Mapping[str, Any]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f": {', '.join(list(names)[:10])}{more}" if names else ""
