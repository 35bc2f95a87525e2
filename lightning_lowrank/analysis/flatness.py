"""Directions without curvature in the loss landscape at a checkpoint, from the full Hessian of a small network.

Shape letters:  P entries of all parameters that are looked at   F flat directions
"""

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_lowrank.analysis.tasks import Measure, inputs, measured
from lightning_lowrank.maths.operators.operators import Layout
from lightning_lowrank.models.names import chosen_parameters

# A Hessian of so many rows takes 128 MB, and its eigenvectors as much.
MOST = 4000
# Random directions that are walked along, each of this part of the parameters' length.
WALKS, STRIDE = 16, 0.1


@dataclass(frozen=True)
class Flatness:
    """The curvature of a loss along all directions.

    Attributes:
        eigenvalues: Eigenvalues of the Hessian of the mean loss, ascending, in float64.
        flat: Orthonormal directions whose eigenvalues count as 0.
        negative: How many eigenvalues are below 0 and do not count as 0.
        gap: Smallest magnitude that does not count as 0, divided by the largest that does, or by float64's rounding. If
            it is not large, the number of flat directions depends on the tolerance.
        gradient: Norm of the gradient. The loss is flat to first order, too, only if this is small.
        shares: For each parameter, the share of its directions that is flat, from 0 to 1.
        walked: Mean absolute change of the loss after a step of a tenth of the parameters' norm: along random flat
            directions, and along random directions of the whole space. Then the loss itself. Flat to second order does
            not mean flat further away.
    """

    eigenvalues: Float[Tensor, " P"]
    flat: Float[Tensor, "P F"]
    negative: int
    gap: float
    gradient: float
    shares: Mapping[str, float]
    walked: tuple[float, float, float]

    def below(self, part: float) -> int:
        """The number of eigenvalues whose magnitude is at most this fraction of the largest."""
        sizes = self.eigenvalues.abs()
        return int((sizes <= part * sizes.max()).sum())


def flatness(
    module: nn.Module,
    batches: Iterable[Any],
    measure: Measure,
    *,
    match: list[str] | None = None,
    tolerance: float = 1e-10,
    seed: int = 0,
) -> Flatness:
    """Eigenvalues of the Hessian of the mean loss over batches, and the directions where it is 0, in float64.

    Cost: for each parameter entry and batch, a backward pass through the gradient; one eigendecomposition of a P x P
    matrix.

    Args:
        module: Network with its weights; a copy in evaluation mode is used.
        batches: At least one.
        measure: Gives a "loss".
        match: Patterns of parameters to use. Default: all.
        tolerance: Eigenvalues count as 0 if their magnitude is at most this fraction of the largest.
        seed: Seed for the random directions.

    Raises:
        ValueError: There are too many parameters, no batches or no "loss", or the Hessian is not finite or entirely 0.

    References:
        Sagun et al. (2018), "Empirical analysis of the Hessian of over-parametrized neural networks", Section 3.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance} must be above 0 and below 1")
    module = deepcopy(module).double().eval()
    named = chosen_parameters(module.requires_grad_(True), match, None)
    layout, size = Layout.of(named), sum(p.numel() for p in named.values())
    if size > MOST:
        raise ValueError(
            f"{size:,} parameters are too many for a full Hessian; the limit is {MOST:,}. Choose some with match, "
            "or let CurvatureMonitor estimate the spectrum in training"
        )
    several = [_wide(batch) for batch in batches]
    loss = _mean_loss(module, several, measure)
    with sdpa_kernel(SDPBackend.MATH):
        gradient, hessian = _derivatives(loss, list(named.values()), layout)
    if not torch.isfinite(hessian).all() or not hessian.any():
        raise ValueError("the Hessian of the loss is not finite or entirely 0")
    values, vectors = torch.linalg.eigh(hessian)
    floor = tolerance * values.abs().max()
    counted = values.abs() > floor
    flat = vectors[:, ~counted]
    shares = layout.sums(flat.square().sum(1)) / torch.tensor(layout.sizes)
    return Flatness(
        values,
        flat,
        int((values < -floor).sum()),
        _gap(values.abs(), counted),
        float(gradient.norm()),
        dict(zip(named, shares.tolist(), strict=True)),
        _walked(loss, named, layout, flat, torch.Generator().manual_seed(seed)),
    )


Loss = Callable[[], Iterable[Tensor]]


def _wide(batch: Any) -> Any:
    """A batch in float64."""
    inputs(batch)
    several = batch if isinstance(batch, list | tuple) else [batch]
    found = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in several]
    return found if isinstance(batch, list | tuple) else found[0]


def _mean_loss(module: nn.Module, batches: list[Any], measure: Measure) -> Loss:
    """What each batch adds to the mean loss."""
    total = sum(len(inputs(batch)) for batch in batches)
    if not total:
        raise ValueError("there are no batches")

    def parts() -> Iterable[Tensor]:
        for batch in batches:
            found = measured(measure, module, batch)
            if "loss" not in found:
                raise ValueError(f'the measure returned {list(found)}; "loss" is missing')
            yield found["loss"] * (len(inputs(batch)) / total)

    return parts


def _derivatives(loss: Loss, parameters: list[Tensor], layout: Layout) -> tuple[Tensor, Float[Tensor, "P P"]]:
    """Gradient and Hessian."""
    size = sum(layout.sizes)
    gradient, hessian = torch.zeros(size).double(), torch.zeros(size, size).double()
    for part in loss():
        first = layout.flatten(torch.autograd.grad(part, parameters, create_graph=True, materialize_grads=True))
        gradient += first.detach()
        for i in range(size) if first.requires_grad else ():
            row = torch.autograd.grad(first[i], parameters, retain_graph=True, materialize_grads=True)
            hessian[i] += layout.flatten(row)
    return gradient, (hessian + hessian.T) / 2


def _gap(sizes: Float[Tensor, " P"], counted: Tensor) -> float:
    rounding = torch.finfo(sizes.dtype).eps * sizes.max()
    return float(sizes[counted].min() / torch.cat([sizes[~counted], rounding[None]]).max())


@torch.no_grad()
def _walked(
    loss: Loss, named: Mapping[str, nn.Parameter], layout: Layout, flat: Tensor, generator: torch.Generator
) -> tuple[float, float, float]:
    start = layout.flatten([p.detach().clone() for p in named.values()])
    before = float(sum(loss()))

    def moved(direction: Tensor) -> float:
        _put(named, layout, start + STRIDE * start.norm() * nn.functional.normalize(direction, dim=0))
        return abs(float(sum(loss())) - before)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    along = [moved(flat @ draw(flat.shape[1])) for _ in range(WALKS)] if flat.shape[1] else [math.nan]
    anywhere = [moved(draw(len(start))) for _ in range(WALKS)]
    _put(named, layout, start)
    return sum(along) / len(along), sum(anywhere) / len(anywhere), before


def _put(named: Mapping[str, nn.Parameter], layout: Layout, vector: Tensor) -> None:
    for parameter, values in zip(named.values(), layout.split(vector), strict=True):
        parameter.copy_(values)
