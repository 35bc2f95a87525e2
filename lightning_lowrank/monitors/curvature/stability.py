"""The edge of stability of an optimizer: the largest curvature along which its steps do not grow.

Shape letters:  P entries of all parameters
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_lowrank.maths.spectra.spectrum import working_dtype

# A subclass may step in any way, so that types are compared and not instances.
KNOWN: tuple[type[Optimizer], ...] = (SGD, Adam, AdamW)


@dataclass(frozen=True)
class Threshold:
    """The edge of stability of an optimizer in its present state, for a quadratic loss.

    Attributes:
        diagonal: The diagonal of D. With H the Hessian, times `sign`, the edge is where the largest eigenvalue of
            D^(1/2) H D^(1/2) is 1. It is 0 for weights that the optimizer does not move, and infinite for those that
            are already unstable.
        sign: -1 for an optimizer that maximises.
        per_group: Largest stable eigenvalue of each parameter group: of the Hessian for SGD; of P^-1 H for Adam, where
            decay that is added to the gradient is only in D.
        is_even: Whether all weights are known to take the same kind of step, and to minimise, without reading from the
            device.
    """

    diagonal: Float[Tensor, " P"]
    sign: int
    per_group: tuple[Tensor, ...]
    is_even: bool = False


def threshold(optimizer: Optimizer, params: Sequence[Tensor]) -> Threshold | None:
    """Where the optimizer becomes unstable; None if unknown, and `why_unknown` gives the reason.

    At the edge a step reverses the sign of the deviation from the minimum. For gradient descent with momentum b,
    dampening d and weight decay w, this is at the eigenvalue 2 (1 + b) / (lr (1 - d)) - w. With Nesterov's momentum it
    is at 2 (1 + b) / (lr (1 + 2 b)) - w. For Adam with its present preconditioner P it is at 2 (1 + b) / (lr (1 - b))
    of P^-1 H. Clipping, schedules and noise are not included.

    Args:
        params: Parameters in the order of the vectors that the diagonal applies to.

    References:
        Cohen et al. (2021), arXiv:2103.00065, Section 2 and Appendix B; (2022), arXiv:2207.14484, Section 3, for Adam.
    """
    if why_unknown(optimizer) is not None:
        return None
    # Before torch 2.7 the groups of AdamW do not say so themselves.
    groups = [{"decoupled_weight_decay": type(optimizer) is AdamW, **group} for group in optimizer.param_groups]
    owners = {id(p): group for group in groups for p in group["params"]}
    parts = [_diagonal(p.detach(), owners.get(id(p)), optimizer.state.get(p, {})).flatten() for p in params]
    limits, sign = tuple(_limit(group) for group in groups), -1 if groups[0]["maximize"] else 1
    everywhere = sign > 0 and {id(p) for p in params} <= owners.keys()
    return Threshold(torch.cat(parts), sign, limits, everywhere and _is_even(groups))


def _is_even(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether one number says what the optimizer does to every weight of its groups."""
    steps = [(group["lr"], group["weight_decay"]) for group in groups]
    plain = all(isinstance(number, float | int) for step in steps for number in step)
    return plain and len(set(steps)) == 1 and not _is_adaptive(groups[0])


def why_unknown(optimizer: Optimizer) -> str | None:
    """Why the edge of stability of an optimizer is not known, None where it is."""
    if type(optimizer) not in KNOWN:
        return (
            f"no edge of stability is known for {type(optimizer).__name__}, only for "
            f"{', '.join(t.__name__ for t in KNOWN)}"
        )
    for key in ("maximize", "momentum", "betas", "nesterov"):
        if any(group.get(key) != optimizer.param_groups[0].get(key) for group in optimizer.param_groups):
            return f"no edge of stability is known if {key!r} differs between parameter groups"
    if "betas" in optimizer.defaults and not optimizer.state:
        return f"{type(optimizer).__name__} has no preconditioner before its first step"
    if any(_of_another_shape(p, state) for p, state in optimizer.state.items()):
        return "no edge of stability is known if moments have another shape than the weights, as in low rank"
    return None


def _of_another_shape(parameter: Tensor, state: dict[str, Any]) -> bool:
    moment = state.get("exp_avg_sq", state.get("momentum_buffer"))
    return moment is not None and moment.shape != parameter.shape


def _diagonal(parameter: Tensor, group: dict[str, Any] | None, state: dict[str, Any]) -> Tensor:
    """The part of D for one parameter."""
    one = torch.ones_like(parameter, dtype=torch.promote_types(torch.float32, parameter.dtype))
    if group is None or (_is_adaptive(group) and not state):
        return torch.zeros_like(one)
    inverse = _reciprocal(group) / _denominator(group, state, one)
    room = 1 - _coupled_decay(group) * inverse
    # What has no axes takes the dtype of the steps.
    return torch.where((room > 0) & (inverse >= 0), inverse / room, torch.inf).to(one)


def _limit(group: dict[str, Any]) -> Tensor:
    limit = 1 / torch.as_tensor(_reciprocal(group), dtype=torch.float64)
    return limit if _is_adaptive(group) else limit - _coupled_decay(group)


def _is_adaptive(group: dict[str, Any]) -> bool:
    return "betas" in group


def _denominator(group: dict[str, Any], state: dict[str, Any], one: Tensor) -> Tensor:
    """What the gradient is divided by, entry by entry."""
    if not _is_adaptive(group):
        return one
    first, second = group["betas"]
    # In float32 the corrections lose digits early in training.
    steps = torch.as_tensor(state["step"]).to(working_dtype(one.device))
    moment = state.get("max_exp_avg_sq", state["exp_avg_sq"]).to(one)
    denominator: Tensor = (1 - first**steps) * ((moment / (1 - second**steps)).sqrt() + group["eps"])
    return denominator


def _reciprocal(group: dict[str, Any]) -> Any:
    """One over the largest stable eigenvalue of what is divided by the denominator, coupled decay included."""
    rate = group["lr"]
    if _is_adaptive(group):
        first = group["betas"][0]
        shrinkage = rate * (group["weight_decay"] - _coupled_decay(group))
        return rate * (1 - first) / ((2 - shrinkage) * (1 + first))
    momentum = group["momentum"]
    along = 1 + 2 * momentum if group["nesterov"] else 1 - group["dampening"] if momentum else 1
    return rate * along / (2 * (1 + momentum))


def _coupled_decay(group: dict[str, Any]) -> Any:
    """The decay that is added to the gradient, and so to the Hessian."""
    return 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
