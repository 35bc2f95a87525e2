"""Multifractal analysis of weights: one function for both ways to look at them."""

from collections.abc import Sequence

import torch
from jaxtyping import Num
from torch import Tensor

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.maths.scaling.neuromfa import THRESHOLD, neuromfa_scaling
from lightning_lowrank.maths.scaling.scaling import ORDERS, Scaling

MODES = ("rank", "neuromfa")
DIRECTIONS = ("in", "out")


def multifractal_spectrum(
    weights: Num[Tensor, "*B M N"] | Sequence[Num[Tensor, "_ _"]],
    mode: str = "rank",
    *,
    direction: str = "out",
    max_neurons: int | None = None,
    generator: torch.Generator | None = None,
    threshold: float = THRESHOLD,
    num_repeats: int = 10,
    orders: Sequence[float] = ORDERS,
) -> Scaling:
    """How much the neurons of weight matrices differ: the scaling of their masses (counts of strong connections), whose
    spectrum is f(alpha).

    Args:
        weights: For "rank" a matrix or a batch of them, for "neuromfa" the matrices of all layers in order; rows are
            outputs, as in `nn.Linear`. For a convolution, pass the norms of its kernels:
            `weight.flatten(2).norm(dim=-1)`.
        mode: "rank": radii are quantiles of the entries, independent of scale; see `rank_scaling`. "neuromfa": lengths
            `1 / |w|` at integer radii, as published; see `neuromfa_scaling`.
        direction: "out": nodes are columns, that is, neurons with their outgoing weights, as published. "in": nodes are
            rows, that is, neurons with their incoming weights.
        max_neurons: Number of nodes to sample in each matrix or layer; None for all.
        generator: Draws the sampled nodes; only needed with `max_neurons`.
        threshold: For "neuromfa": longest edge that is kept.
        num_repeats: For "neuromfa" with `max_neurons`: number of samples, along the leading axis of the result.
        orders: Values of q at which vectors are evaluated.

    Raises:
        ValueError: There is no such mode or direction, or neurons are to be sampled without a generator.

    Examples:
        >>> weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
        >>> statistics.valid(multifractal_spectrum(weights))
        tensor(1., dtype=torch.float64)
    """
    if mode not in MODES or direction not in DIRECTIONS:
        raise ValueError(
            f"multifractal_spectrum: mode={mode!r} with direction={direction!r}; choose from {MODES} and {DIRECTIONS}"
        )
    if max_neurons is not None and generator is None:
        raise ValueError(
            f"max_neurons={max_neurons} are drawn at random; give a generator, such as torch.Generator().manual_seed(0)"
        )
    if mode == "neuromfa":
        matrices = [weights] if isinstance(weights, Tensor) else weights
        nodes = [matrix if direction == "in" else matrix.mT for matrix in matrices]
        return neuromfa_scaling(
            nodes,
            threshold=threshold,
            max_neurons=max_neurons,
            num_repeats=num_repeats,
            generator=generator,
            orders=orders,
        )
    if not isinstance(weights, Tensor):
        raise ValueError(
            'mode="rank" needs one tensor, a matrix or a batch of matrices; call it once per layer if shapes differ'
        )
    rows = weights if direction == "in" else weights.mT
    if max_neurons is not None:
        assert generator is not None
        drawn = torch.randperm(rows.shape[-2], generator=generator, device=generator.device)[:max_neurons]
        rows = rows[..., drawn.to(rows.device), :]
    return rank_scaling(rows, orders=orders)
