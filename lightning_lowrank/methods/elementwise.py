"""Properties of the user's optimizer: whether it updates each entry independently, how it decays weights, and the size
of its state.
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
WORKING = "torch's SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta and Rprop, Lion and similar ones"
INSTEAD = f"use an optimizer that updates each entry independently: {WORKING}"
# As in tests of a single matrix, on the CPU or without any memory.
PLAIN = {"fused": False, "foreach": False, "capturable": False}
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def decay_of(optimizer: Optimizer, group: dict[str, Any]) -> Decay:
    """How an optimizer decays the weights of a group, found by a test on a small matrix, on the CPU in float64.

    The test runs the optimizer twice. The first time it steps the matrix. The second time it steps zeros instead; the
    result is added to the matrix, with the decay applied outside. Both must agree.

    Raises:
        ValueError: The optimizer fails, uses the weights in another way (LAMB, LARS), or mixes entries (Muon, Shampoo,
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
        raise ValueError(f"{name} failed on a small test matrix ({reason}); {INSTEAD}") from error
    if not _near(plain[marked], others[marked]):
        raise ValueError(f"{name} updates each entry with the gradients of other entries; {INSTEAD}")
    if not agreed:
        raise ValueError(f"the steps of {name} depend on the weights in another way than weight decay; {INSTEAD}")
    return agreed[0]


def decayed(gradient: Tensor, weight: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient, with the weight decay of an optimizer with coupled decay added."""
    strength = float(group.get("weight_decay") or 0.0)
    return gradient.add(weight, alpha=-strength if group.get("maximize") else strength) if strength else gradient


def decay_(weight: Tensor, group: dict[str, Any], skipped: Tensor | None = None) -> None:
    """Shrink a weight as an optimizer with decoupled decay does before its step.

    Args:
        skipped: 1 if the optimizer skipped its step, as fused ones do under a GradScaler.
    """
    if strength := group.get("weight_decay") or 0.0:
        share = 1 if skipped is None else 1 - skipped.to(weight)
        weight.mul_(1 - float(group["lr"]) * float(strength) * share)


def state_of(optimizer: Optimizer, group: dict[str, Any], shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """The state that an optimizer keeps for a parameter of a shape, from a step on meta tensors."""
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
