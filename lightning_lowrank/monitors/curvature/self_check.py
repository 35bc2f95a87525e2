"""Whether products with a Hessian are what they should be: symmetric, and the slope of the gradient.

Shape letters:  P entries of all parameters
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_lowrank.maths.operators.estimates import Estimate
from lightning_lowrank.maths.operators.operators import Layout, Operator, hessian
from lightning_lowrank.maths.spectra.spectrum import lengths_of, ratio, unit_vectors
from lightning_lowrank.monitors.curvature.moving import moving

# Largest defect that is believed: rounding in bfloat16 makes a tenth of it, in float32 a thousandth of that.
VALID = 0.05
# How often farther from the product than from each other differences may be. On nets with kinks, of which each
# difference sees others, the ratio was at most 2.2 in 144 cases; a product that is wrong by ten percent has one of
# hundreds.
KINKS = 5.0
# Length of the longer step, in lengths of the weights.
STEP = 1e-3

Losses = Callable[[], AbstractContextManager[Tensor]]


def symmetry_defect(operator: Operator, generator: torch.Generator) -> Float[Tensor, ""]:
    """|u^T A v - v^T A u| over the mean length of A u and A v, for two Gaussian vectors: rounding where A is symmetric,
    as it should be.

    Two products. An antisymmetric part of a share s of the Frobenius norm shows as about 1.6 s.
    """
    size, dtype, device = operator.size, operator.dtype, operator.device
    one, other = torch.randn(2, size, generator=generator, dtype=dtype, device=device)
    images = operator.multiply(one), operator.multiply(other)
    lengths = lengths_of(torch.stack(images))
    return ratio((one.dot(images[1]) - other.dot(images[0])).abs(), lengths.mean())


def difference_defect(losses: Losses, params: Sequence[Tensor]) -> Estimate:
    """|H u - d| over the longer of both, with d a central difference of gradients along u, the direction of the
    gradient: rounding where H is their slope.

    The error is how far the difference over twice the step is from d. Where activations have kinks (ReLU, max pooling)
    differences see them and a Hessian does not: both numbers are large then, and tell nothing. Takes five gradients and
    a product.

    Args:
        losses: Gives the loss at the parameters as they are, with its graph, while its context lasts.
    """
    layout = Layout.of({str(i): p for i, p in enumerate(params)})

    def slope() -> Tensor:
        with losses() as loss:
            found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        return layout.flatten([g.detach() for g in found])

    with losses() as loss:
        gradient, operator = hessian(loss, params)
        along, _ = unit_vectors(gradient)
        image = operator.multiply(along)
    with moving(params) as (start, put):
        longer = STEP * lengths_of(layout.flatten(start))

        def slope_at(step: Tensor) -> Tensor:
            put(a + (step * part).to(a.dtype) for a, part in zip(start, layout.split(along), strict=True))
            return slope()

        far, near = ((slope_at(step) - slope_at(-step)) / (2 * step) for step in (longer, longer / 2))
    length = torch.maximum(lengths_of(image), lengths_of(near))
    return Estimate(ratio(lengths_of(near - image), length), ratio(lengths_of(far - near), length))


def is_wrong(defect: Estimate) -> Float[Tensor, ""]:
    """1 where a product is not the slope of the gradient, 0 where it is, or where differences cannot tell."""
    return (defect.value > VALID + KINKS * defect.error).to(defect.value)


def is_resolved(numbers: Tensor) -> Bool[Tensor, ""]:
    """Whether the largest value is 0, or so far above the smallest number of the dtype that products with it keep their
    digits. Values that are not finite are another fault.

    In float32 this limit is 1e-31. A smaller gradient consists of numbers that were rounded to 0 on the way.
    """
    largest, limits = numbers.abs().amax(), torch.finfo(numbers.dtype)
    return ~((largest > 0) & (largest <= limits.tiny / limits.eps))
