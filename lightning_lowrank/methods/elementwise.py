"""What a method must know of an optimizer of the user's: whether it treats each entry by itself, how it decays weights,
and how much it keeps.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Decay = Literal["decoupled", "coupled"]
# Entries of the matrix that optimizers are tried on, and steps: RAdam changes its formula at the sixth.
SHAPE, STEPS = (8, 6), 8
# In float64, of steps of about 0.01.
TOLERANCE = 1e-9
WORKING = "SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta and Rprop of torch, Lion and their like"
INSTEAD = f"what works treats each entry by itself: {WORKING}"
# As in tests of a single matrix, on the CPU or without any memory.
PLAIN = {"fused": False, "foreach": False, "capturable": False}
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def decay_of(optimizer: Optimizer, group: dict[str, Any]) -> Decay:
    """How an optimizer decays the weights of a group, by trying it on a small matrix, on the CPU in float64.

    It is tried once as it is, and once with the matrix taken out: it sees zeros in its place, and what it makes of them
    is added to the matrix, with the decay applied outside. Both must agree.

    Raises:
        ValueError: It fails; it reads the weights in another way (LAMB, LARS); it mixes entries (Muon, Shampoo,
            Adafactor).
    """
    name = type(optimizer).__name__
    trial = {key: value for key, value in (("lr", 0.01), ("weight_decay", 0.1)) if group.get(key) is not None}
    settings = deepcopy({key: value for key, value in group.items() if key != "params"}) | trial
    generator = torch.Generator().manual_seed(0)
    start, *draws = torch.randn(2 + STEPS, *SHAPE, generator=generator, dtype=torch.float64)
    gradients, marked = draws[:STEPS], draws[-1] > 0
    try:
        plain = _run(optimizer, settings, start, gradients)
        others = _run(optimizer, settings, start, [g.where(marked, 3 * g.flip(0) - 1) for g in gradients])
        agreed = [kind for kind in _KINDS if _near(_run(optimizer, settings, start, gradients, kind), plain)]
    except Exception as error:  # of the user's optimizer, on what it was not made for
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} cannot be tried on a small matrix ({reason}); {INSTEAD}") from error
    if not _near(plain[marked], others[marked]):
        raise ValueError(f"{name} makes the step of an entry depend on the gradients of others; {INSTEAD}")
    if not agreed:
        raise ValueError(f"{name} makes steps depend on the weights in a way that is no weight decay; {INSTEAD}")
    return agreed[0]


def decayed(gradient: Tensor, weight: Tensor, group: dict[str, Any]) -> Tensor:
    """A gradient with the decay of an optimizer that couples both."""
    strength = float(group.get("weight_decay") or 0.0)
    return gradient.add(weight, alpha=-strength if group.get("maximize") else strength) if strength else gradient


def decay_(weight: Tensor, group: dict[str, Any], skipped: Tensor | None = None) -> None:
    """Shrink a weight as an optimizer with decoupled decay does before its step.

    Args:
        skipped: 1 where the optimizer has left out its step, as fused ones do under a GradScaler.
    """
    if strength := group.get("weight_decay") or 0.0:
        share = 1 if skipped is None else 1 - skipped.to(weight)
        weight.mul_(1 - float(group["lr"]) * float(strength) * share)


def state_of(optimizer: Optimizer, group: dict[str, Any], shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """What an optimizer keeps of a parameter of a shape: it makes a step on tensors without memory."""
    parameter = nn.Parameter(torch.zeros(tuple(shape), dtype=dtype, device="meta"))
    probe = _alone(optimizer, {key: value for key, value in group.items() if key != "params"}, parameter)
    parameter.grad = torch.zeros_like(parameter)
    probe.step(lambda: None)  # type: ignore[arg-type, return-value]
    return dict(probe.state[parameter])


def num_bytes(state: dict[str, Any]) -> int:
    """Bytes of the tensors of one parameter's state."""
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))


def _run(
    optimizer: Optimizer, settings: dict[str, Any], start: Tensor, gradients: Sequence[Tensor], decay: str = ""
) -> Tensor:
    """Where a matrix ends after some steps: as a parameter, or beside it, with its decay outside."""
    weight, parameter = start.clone(), nn.Parameter(start.clone())
    probe, calls = _alone(optimizer, settings, parameter), []
    for gradient in gradients:
        if decay:
            parameter.data.zero_()
        given = (decayed(gradient, weight, settings) if decay == "coupled" else gradient).clone()

        def closure(given: Tensor = given) -> None:
            parameter.grad = given
            calls.append(given)

        probe.step(closure)  # type: ignore[arg-type]
        if decay == "decoupled":
            decay_(weight, settings)
        weight = weight + parameter.data if decay else parameter.data
    if len(calls) != len(gradients):
        raise ValueError("its step does not call its closure once")
    return weight.clone()


# Of plain SGD both hold, and its code couples them.
_KINDS: tuple[Decay, ...] = ("coupled", "decoupled")


def _near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=TOLERANCE)


def _alone(optimizer: Optimizer, settings: dict[str, Any], parameter: nn.Parameter) -> Optimizer:
    """An optimizer of the same kind and settings with one parameter, that nobody has hooked."""
    alone: Optimizer = object.__new__(type(optimizer))
    # A scheduler puts a step of its own over that of the class; GradScalers leave what they found.
    gone = ("step", "grad_scale", "found_inf")
    vars(alone).update({key: value for key, value in vars(optimizer).items() if key not in gone})
    plain = {key: value for key, value in PLAIN.items() if key in settings}
    alone.state, alone.param_groups = defaultdict(dict), [{**settings, **plain, "params": [parameter]}]
    vars(alone).update({name: OrderedDict() for name in HOOKS})
    return alone
