"""Orthonormal factors in training, by a penalty on gradients or by steps along the Stiefel manifold; and a bound on the
change of the product in one step.

Shape letters:  M rows, N columns of a weight   R rank
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.methods.factorize.factors import Factors, change_norm, orthogonality_gap
from lightning_lowrank.methods.factorize.layers import Place

Orthogonality = Literal["soft", "stiefel"]
# Moments that are sums of gradients, and move with the tangent space.
LINEAR = ("exp_avg", "momentum_buffer")
# Factors farther from orthonormal are put back before the first step.
TOLERANCE = 1e-5
# Times that a step is shortened until its change is within the bound.
MOST_HALVINGS = 50


@dataclass(eq=False)
class OrthogonalSteps:
    """Acts before and after each step of an optimizer.

    Attributes:
        kind: Method that keeps factors orthonormal; None for none.
        weight: Weight of the penalty.
        bound: Largest spectral norm of the change of the product in one step; None for no bound.
    """

    kind: Orthogonality | None = None
    weight: float = 1e-4
    bound: float | None = None
    _places: Sequence[Place] = ()
    _hooks: list[RemovableHandle] = field(default_factory=list)
    # By optimizer that steps now, what its factors were.
    _stepping: dict[int, list[tuple[Place, list[Tensor]]]] = field(default_factory=dict)

    def refuse(self, name: str, optimizers: Sequence[Optimizer], dtypes: Mapping[str, torch.dtype]) -> None:
        """Refuse factors that cannot be kept orthonormal.

        Args:
            name: Name for messages.
            optimizers: Optimizers that step them.
            dtypes: Dtypes of the weights, by name.

        Raises:
            ValueError: They are in half precision, or LBFGS steps them.
        """
        if self.kind != "stiefel":
            return
        where = f"{name}(orthogonality='stiefel')"
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
            raise ValueError(
                f"{where}: LBFGS searches along lines, which leave the manifold; use AdamW, SGD or a similar optimizer"
            )
        half = next((key for key, dtype in dtypes.items() if dtype not in (torch.float32, torch.float64)), None)
        if half is not None:
            raise ValueError(
                f"{where}: {half!r} is in {dtypes[half]}, too coarse for orthonormal columns; use float32 or mixed "
                "precision"
            )

    def begin(self, optimizers: Sequence[Optimizer], places: Sequence[Place]) -> None:
        """Start to act."""
        self.end()
        if (self.kind is None and self.bound is None) or not places:
            return
        self._places = places
        if self.kind == "stiefel":
            for place in places:
                # Where it is orthonormal, as in a run that is resumed, nothing may change.
                if max(orthogonality_gap(_columns(p, rows)) for p, rows in orthonormal(place)) > TOLERANCE:
                    self._retract(place, None)
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            # Hooks of others that read a step see it done.
            cast(OrderedDict[int, Any], optimizer._optimizer_step_post_hooks).move_to_end(
                self._hooks[-1].id, last=False
            )

    def end(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._places = ()
        self._stepping.clear()

    def __getstate__(self) -> dict[str, Any]:
        """A copy acts on a training of its own."""
        return vars(self) | {"_places": (), "_hooks": [], "_stepping": {}}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change gradients when they are there: after the user's own closure."""
        given = args[1] if len(args) > 1 else kwargs.get("closure")
        if id(optimizer) in self._stepping and given is None:
            return None  # the step of a subclass calls that of its parent, which calls the hooks too
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        places = [place for place in self._places if any(id(p) in own for p in place.parameters)]
        self._stepping[id(optimizer)] = [(place, [p.detach().clone() for p in place.parameters]) for place in places]
        if self.kind is None:
            return None

        def closure() -> Any:
            loss = None if given is None else given()
            self._change_gradients(optimizer, places)
            return loss

        return (args[:1] + (closure,) + args[2:], kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closure})

    @torch.no_grad()
    def _change_gradients(self, optimizer: Optimizer, places: Sequence[Place]) -> None:
        # A fused optimizer unscales within its step.
        scale = getattr(optimizer, "grad_scale", None)
        for parameter, rows in (pair for place in places for pair in orthonormal(place)):
            if parameter.grad is None:
                continue
            point, slope = _columns(parameter, rows), _columns(parameter.grad, rows)
            if self.kind == "stiefel":
                new = tangent(point, slope)
            else:
                push = 4 * self.weight * (point @ (point.mT @ point - torch.eye(point.shape[1]).to(point)))
                new = slope + (push if scale is None else push * scale)
            parameter.grad.copy_((new.mT if rows else new).reshape(parameter.shape))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for place, before in self._stepping.pop(id(optimizer), ()):
            if self.kind == "stiefel":
                self._retract(place, optimizer)
            if self.bound is not None:
                self._shorten(place, before)

    @torch.no_grad()
    def _retract(self, place: Place, optimizer: Optimizer | None) -> None:
        """Put factors back on the manifold, and the sums of their gradients into the new tangent space."""
        for parameter, rows in orthonormal(place):
            point = retraction(_columns(parameter, rows))
            parameter.copy_((point.mT if rows else point).reshape(parameter.shape))
            kept = {} if optimizer is None else optimizer.state.get(parameter, {})
            for moment in (kept[name] for name in LINEAR if isinstance(kept.get(name), Tensor)):
                moved = tangent(point, _columns(moment, rows))
                moment.copy_((moved.mT if rows else moved).reshape(moment.shape))

    @torch.no_grad()
    def _shorten(self, place: Place, before: Sequence[Tensor]) -> None:
        """Go back along the step until the change of the product is within the bound."""
        assert self.bound is not None
        start, after = _factors(before), [p.detach().clone() for p in place.parameters]
        norm, share = change_norm(start, place.factors), 1.0
        for _ in range(MOST_HALVINGS):
            if not norm > self.bound:
                return
            share *= min(0.99 * self.bound / float(norm), 0.99) if norm.isfinite() else 0.0
            for parameter, old, new in zip(place.parameters, before, after, strict=True):
                parameter.copy_(old.lerp(new, share) if share else old)
            if self.kind == "stiefel":
                self._retract(place, None)
            norm = change_norm(start, place.factors)


def orthonormal(place: Place) -> Iterator[tuple[nn.Parameter, bool]]:
    """Factors that should be orthonormal, and for each whether this means its rows instead of its columns."""
    left, _, right = place.parameters
    yield left, False
    yield right, True


def tangent(point: Float[Tensor, "M R"], gradient: Num[Tensor, "M R"]) -> Float[Tensor, "M R"]:
    """The part of a gradient along the Stiefel manifold, `X - A sym(A'X)`, by the Euclidean metric.

    References:
        Edelman, Arias & Smith (1998), SIAM J. Matrix Anal. Appl. 20(2), equation 2.35.
    """
    inner = point.mT @ gradient
    return gradient - point @ ((inner + inner.mT) / 2)


def retraction(point: Float[Tensor, "M R"]) -> Float[Tensor, "M R"]:
    """The orthonormal factor of the QR decomposition whose triangle has a positive diagonal.

    References:
        Absil, Mahony & Sepulchre (2008), Optimization Algorithms on Matrix Manifolds, example 4.1.3.
    """
    basis, triangle = torch.linalg.qr(point)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(point)
    point_on: Tensor = basis * signs
    return point_on


def _columns(tensor: Num[Tensor, "..."], rows: bool) -> Num[Tensor, "M R"]:
    matrix = tensor.detach().flatten(1)
    return matrix.mT if rows else matrix


def _factors(parameters: Sequence[Tensor]) -> Factors:
    left, scale, right = parameters
    return Factors(left, scale, right.flatten(1))
