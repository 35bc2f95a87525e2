"""`SubspaceTraining` as an act on a training: weights move along a basis, everything else is frozen except what is
named.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lowrank.methods.matrices import Owner, owners_of
from lightning_lowrank.methods.method import Act
from lightning_lowrank.methods.subspace_training.layers import (
    Place,
    attach,
    detach,
    places,
    random_directions,
    trouble,
)
from lightning_lowrank.models.basis_files import Basis
from lightning_lowrank.models.names import chosen_parameters
from lightning_lowrank.models.training import Training


@dataclass(frozen=True)
class Settings:
    """Options of `SubspaceTraining`.

    Attributes:
        basis: Path of a file, or "random".
        k: Number of directions of each weight.
        include_mean: Start at the weights plus the mean of the basis.
        match: Patterns of weights that move.
        exclude: Patterns of weights that do not.
        train_also: Patterns of parameters that train in full; "*" means all that do not move.
        seed: Seed for random directions.
    """

    basis: str
    k: int
    include_mean: bool
    match: tuple[str, ...] | None
    exclude: tuple[str, ...] | None
    train_also: tuple[str, ...]
    seed: int


@dataclass
class Prepared:
    """State of the directions of a module, in its attribute `subspace_prepared`; a copy has it, too.

    Attributes:
        settings: Options.
        flags: Whether each parameter trained before, by name.
        orders: Names of the parameters of each layer in their order, by path.
        means: What is added to each weight at the start, by key.
        left_out: Parameters that do not move, with the reason.
        settled: Whether the means have been added to the weights.
        bare: Whether only weights without coefficients were loaded.
    """

    settings: Settings
    flags: dict[str, bool]
    orders: dict[str, list[str]]
    means: dict[str, Tensor]
    left_out: dict[str, str]
    settled: bool = False
    bare: bool = False


@dataclass(eq=False)
class Subspaces(Act):
    """Lets weights move along directions, trains their coefficients, and can continue a run.

    Attributes:
        settings: Options.
        module: The module that was prepared last.
    """

    settings: Settings
    name: str = "SubspaceTraining"
    structural = True
    module: nn.Module | None = None
    _loaded: dict[str, Any] | None = field(default=None)

    def prepare(self, module: nn.Module, *, fresh: bool = True) -> None:
        """Give weights their directions and freeze the rest, unless this has been done."""
        self.module, before = module, prepared(module)
        if before is not None:
            if before.settings != self.settings:
                raise ValueError(
                    f"{self.name}: the module already has directions with other settings: {before.settings} instead "
                    f"of {self.settings}. First call SubspaceTraining.merge(module)"
                )
            return
        found, left_out, means = chosen(module, self.settings)
        flags = {name: p.requires_grad for name, p in module.named_parameters()}
        orders = {path: list(layer._parameters) for path, layer in module.named_modules()}
        along = {id(getattr(owner.layer, owner.local)) for owner, _ in found.values()}
        trained = whole(module, self.settings) - along
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(id(parameter) in trained)
            left_out |= {name: "trains whole"} if id(parameter) in trained else {}
        for owner, directions in found.values():
            attach(owner.layer, owner.local, directions)
        state = module.__dict__["subspace_prepared"] = Prepared(self.settings, flags, orders, means, left_out)
        module.register_load_state_dict_pre_hook(complete)
        if fresh:
            settle(module, state)

    def begin(self, training: Training) -> str:
        """Refuse coefficients that would not train."""
        state = prepared(training.module)
        if state is None:
            raise ValueError(
                f"{self.name}: the module has no directions; call .prepare(model) before you create its optimizer"
            )
        self.module = training.module
        if state.bare and self._loaded is not None:
            raise ValueError(
                f"{self.name}: the checkpoint is from a run without directions; load its weights into the module "
                "first and start a new run"
            )
        state.bare = False
        settle(training.module, state)
        found = places(training.module)
        refuse_idle(self.name, training, found)
        return _table(training.module, state, found)

    def end(self) -> None:
        """The module keeps its directions until they are merged."""

    def forget(self) -> None:
        """The next run does not continue this one."""
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """Marks of the directions; the coefficients are in the state of the module."""
        if prepared(self.module) is None or self.module is None:
            return self._loaded or {}
        return {"marks": {place.name: _mark(place.holder.directions) for place in places(self.module)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a stopped run.

        Raises:
            ValueError: It used other directions.
        """
        self._loaded = state
        if prepared(self.module) is None or self.module is None or not state:
            return
        own = {place.name: _mark(place.holder.directions) for place in places(self.module)}
        given = state["marks"]
        other = [
            name
            for name in {**own, **given}
            if name not in own or name not in given or not _same(own[name], given[name])
        ]
        if other:
            raise ValueError(
                f"{self.name}: the resumed run used other directions for {other[:5]}; give the same basis, k, match "
                "and exclude"
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy acts on a training of its own."""
        return vars(self) | {"module": None}


def prepared(module: nn.Module | None) -> Prepared | None:
    """State of the directions of a module; None if it has none."""
    return None if module is None else module.__dict__.get("subspace_prepared")


@torch.no_grad()
def settle(module: nn.Module, state: Prepared) -> None:
    """Add the means to the weights, once."""
    if not state.settled:
        for place in places(module):
            if place.key in state.means:
                place.weight.data += state.means[place.key].to(place.weight)
    state.settled = True
    state.means = {}


def merge(module: nn.Module) -> nn.Module:
    """Add the change to the weights. Keys, classes and trainable parameters are then those of before.

    Raises:
        ValueError: The module has no directions.
    """
    state = prepared(module)
    if state is None:
        raise ValueError(f"{type(module).__name__} has no directions from SubspaceTraining")
    for place in places(module):
        detach(place)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is complete:
            del module._load_state_dict_pre_hooks[key]
    del module.__dict__["subspace_prepared"]
    for path, layer in module.named_modules():
        known = layer._parameters
        layer._parameters = {n: known[n] for n in (*state.orders.get(path, ()), *known) if n in known}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(state.flags.get(name, parameter.requires_grad))
    return module


def complete(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before values are loaded: accept original weights, with zero coefficients.

    Raises:
        ValueError: There are coefficients of other directions.
    """
    state = prepared(module)
    assert state is not None
    found = {f"{prefix}{place.parametrization}": place for place in places(module, all_names=True)}
    coefficients = re.compile(rf"({re.escape(prefix)}(?:.*\.)?parametrizations\..*)\.0\.coefficients")
    own = {within: len(place.holder.coefficients) for within, place in found.items()}
    # A parametrization of the user's may have coefficients too.
    theirs = {f"{prefix}{name}" for name, _ in module.named_parameters()} - {f"{at}.0.coefficients" for at in own}
    given = {
        hit[1]: value.numel()
        for key, value in state_dict.items()
        if key not in theirs and (hit := coefficients.fullmatch(key))
    }
    if other := {name: (k, own.get(name, 0)) for name, k in given.items() if own.get(name) != k}:
        raise ValueError(
            "SubspaceTraining: the checkpoint has other numbers of directions than the module: "
            f"{dict(list(other.items())[:4])}; give the same basis, k, match and exclude"
        )
    for within, place in found.items():
        if f"{within}.0.coefficients" in state_dict:
            state.settled = True
        elif prefix + place.key in state_dict:
            state.bare = True
            state_dict[f"{within}.original"] = state_dict.pop(prefix + place.key)
            state_dict[f"{within}.0.coefficients"] = torch.zeros_like(place.holder.coefficients)


def whole(module: nn.Module, settings: Settings) -> set[int]:
    """Ids of parameters that `train_also` matches: frozen ones too, unless all are meant."""
    if not settings.train_also:
        return set()
    also = chosen_parameters(module, settings.train_also, None).values()
    return {id(p) for p in also if p.requires_grad or "*" not in settings.train_also}


def chosen(
    module: nn.Module, settings: Settings
) -> tuple[dict[str, tuple[Owner, Float[Tensor, "K *shape"]]], dict[str, str], dict[str, Tensor]]:
    """Weights with their directions by key, weights that stay with the reason, and the means of the basis.

    Raises:
        ValueError: The basis is from another architecture, or a requested weight cannot move along directions.
    """
    if adapter := next((name for name, _ in module.named_parameters() if "lora_" in name), None):
        raise ValueError(f"SubspaceTraining: the module has an adapter, {adapter!r}; merge it first")
    owners = owners_of(module)
    named = {id(p): name for name, p in module.named_parameters()}
    wanted = {named[id(p)] for p in chosen_parameters(module, settings.match, settings.exclude).values()}
    trained = set() if "*" in settings.train_also else whole(module, settings)
    basis = None if settings.basis == "random" else Basis(settings.basis)
    prefix = "" if basis is None else _prefix(basis, module)
    found, left_out, means = {}, {}, {}
    for name, parameter in module.named_parameters():
        several = owners[id(parameter)]
        why = "not asked for" if name not in wanted else trouble(several[0].layer, len(several))
        why = "trains whole" if id(parameter) in trained else why if parameter.requires_grad else "frozen"
        own = name.removeprefix(prefix)
        if why is None and basis is not None and not (name.startswith(prefix) and own in basis.shapes):
            why = "not in the basis"
        if why is not None or not parameter.is_floating_point():
            left_out[name] = why or "not real numbers"
        elif basis is None:
            found[name] = several[0], random_directions(parameter.shape, settings.k, settings.seed, name)
        else:
            found[name], means[name] = _of_basis(basis, own, several[0], settings)
    if not found:
        raise ValueError(f"SubspaceTraining: no weight is left to train; left out: {dict(list(left_out.items())[:8])}")
    return found, left_out, means


def _of_basis(
    basis: Basis, name: str, owner: Owner, settings: Settings
) -> tuple[tuple[Owner, Float[Tensor, "K *shape"]], Tensor]:
    shape = getattr(owner.layer, owner.local).shape
    if basis.shapes[name] != shape:
        raise ValueError(
            f"SubspaceTraining: {settings.basis} is from another architecture: {name!r} has shape "
            f"{tuple(basis.shapes[name])} there and {tuple(shape)} in the module"
        )
    share = basis.share(name)
    mean = share.mean if settings.include_mean else torch.zeros_like(share.mean)
    return (owner, share.components[: settings.k].float()), mean


def _prefix(basis: Basis, module: nn.Module) -> str:
    """What names of the module have before those of the basis.

    Raises:
        ValueError: The module lacks one of its parameters; a basis may have buffers too.
    """
    everything = (module.named_parameters, module.named_buffers)
    names = dict.fromkeys(name for named in everything for name, _ in named(remove_duplicate=False))
    first_name = next(iter(basis.shapes))
    prefixes = [name.removesuffix(first_name) for name in names if name.endswith(first_name)] or [""]
    lacking = {prefix: [prefix + name for name in basis.shapes if prefix + name not in names] for prefix in prefixes}
    prefix, missing = min(lacking.items(), key=lambda entry: len(entry[1]))
    if missing:
        raise ValueError(
            f"SubspaceTraining: {basis.path} is from another architecture: the module lacks {missing[:5]}; it has "
            f"{list(names)[:5]}"
        )
    return prefix


def refuse_idle(name: str, training: Training, found: Sequence[Place]) -> None:
    """Refuse coefficients that no optimizer steps, and optimizers that step nothing.

    Raises:
        ValueError: There is one; the message names it.
    """
    owned = {id(p) for o in training.optimizers for group in o.param_groups for p in group["params"]}
    for place in found:
        if place.weight.requires_grad or not place.holder.coefficients.requires_grad:
            raise ValueError(
                f"{name}: {place.name!r} must be frozen and its coefficients must not; something has changed "
                "requires_grad"
            )
        if id(place.holder.coefficients) not in owned:
            raise ValueError(
                f"{name}: no optimizer has the coefficients of {place.name!r}; in configure_optimizers, pass all "
                "trainable parameters, such as self.parameters()"
            )
    for optimizer in training.optimizers:
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"{name}: {type(optimizer).__name__} has only frozen parameters; to train some of them, give "
                "train_also=..."
            )


def _table(module: nn.Module, state: Prepared, found: Sequence[Place]) -> str:
    counts = {place.name: place.holder.coefficients.numel() for place in found}
    all_trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in module.parameters()) - sum(counts.values())
    also = all_trained - sum(counts.values())
    rows = [
        (
            f"{len(found)} weights move along {sum(counts.values())} directions of {state.settings.basis}; "
            f"{all_trained:,} of {whole:,} parameters train"
        )
        + (f", {also:,} of them in full" if also else "")
    ]
    rows += [f"  {place.name}  {tuple(place.weight.shape)}  {counts[place.name]} directions" for place in found]
    left = ", ".join(f"{name} ({why})" for name, why in state.left_out.items())
    return "\n".join([*rows, *([f"  not along directions: {left}"] if left else [])])


def _mark(directions: Tensor) -> Float[Tensor, " K"]:
    """A number of each direction that tells it from others."""
    flat = directions.detach().cpu().double().reshape(len(directions), directions.shape[1:].numel())
    return flat @ torch.linspace(1, 2, flat.shape[1], dtype=torch.float64)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-2)
