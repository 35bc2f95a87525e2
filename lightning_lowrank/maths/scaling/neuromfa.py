"""The published recipe of NeuroMFA: one hop, lengths 1 / |w|, integer radii up to a threshold, sampled neurons.

Shape letters:  S source neurons (rows)   N target neurons (columns)   T integer radii   K repeats   B any batch axes
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lightning_lowrank.maths.scaling.boxes import magnitudes
from lightning_lowrank.maths.scaling.scaling import ORDERS, Scaling
from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype

THRESHOLD = 150.0

# A neuron with no more edges than that is left out.
FEW_EDGES = 10

CHUNK = 2**20

# Of the spectrum f(alpha), which is of the order of 1.
ROUNDING = 1e-12


def neuromfa_scaling(
    weights: Sequence[Num[Tensor, "_ _"]],
    *,
    threshold: float = THRESHOLD,
    max_neurons: int | None = None,
    num_repeats: int = 10,
    generator: torch.Generator | None = None,
    orders: Sequence[float] = ORDERS,
) -> Scaling:
    """Scaling of a network of neurons as its authors' code has it: every neuron with its edges to the next layer, all
    layers in one sum.

    An edge has length `1 / |w|`. Kept are lengths above 1 and up to the threshold, rounded to integers, and neurons
    with more than 10 of them. Radii are all the integers that occur; shares are of a neuron's own edges. The result
    depends on the scale of the weights, on the threshold and on how many neurons are sampled: compare it with
    `shuffled` and `gaussian_like` weights, not between models.

    Args:
        weights: Matrices of all layers in order; rows are source neurons, columns the neurons that they feed.
        threshold: Longest edge that is kept.
        max_neurons: Sampled per layer; twice that in layers four times as wide as the narrowest, in proportion in those
            between. None takes all neurons, once.
        num_repeats: How many samples, along the leading axis of the result, where neurons are sampled.
        generator: Draws the samples: in the same state at every call, the same neurons.
        orders: The q at which vectors are evaluated.

    Raises:
        ValueError: Neurons are to be sampled without a generator.

    References:
        Xiao et al. (2025), ICLR, arXiv:2402.09099, for the idea; for the numbers its code, `wnfd_llm` in
        joshuaxiao98/Neuron_MFA_LLM.
    """
    with full_precision(weights[0].device):
        if max_neurons is None:
            return _scaling(_edge_counts(weights, threshold), orders)
        if generator is None:
            raise ValueError(
                f"max_neurons={max_neurons} are drawn at random; give a generator, such as "
                "torch.Generator().manual_seed(0)"
            )
        samples = [sample_neurons(weights, max_neurons, generator=generator) for _ in range(num_repeats)]
        return _scaling(torch.stack([_edge_counts(sample, threshold) for sample in samples]), orders)


def sample_neurons(
    weights: Sequence[Num[Tensor, "_ _"]], max_neurons: int, *, generator: torch.Generator
) -> list[Num[Tensor, "_ _"]]:
    """The weights between neurons drawn from each layer: the same for the matrix that ends in a layer and that which
    begins there.
    """
    narrowest = min(min(weight.shape) for weight in weights)
    sampled: list[Tensor] = []
    targets = torch.empty(0)
    last = 0
    for weight in weights:
        sources = targets if weight.shape[0] == last else _draw(weight.shape[0], narrowest, max_neurons, generator)
        targets, last = _draw(weight.shape[1], narrowest, max_neurons, generator), weight.shape[1]
        sampled.append(weight[sources.to(weight.device)][:, targets.to(weight.device)])
    return sampled


def _draw(neurons: int, narrowest: int, max_neurons: int, generator: torch.Generator) -> Int[Tensor, " _"]:
    wider = neurons // narrowest
    count = max_neurons * (2 if wider >= 4 else wider)
    return torch.randperm(neurons, generator=generator, device=generator.device)[:count]


def _edge_counts(weights: Sequence[Num[Tensor, "_ _"]], threshold: float) -> Float[Tensor, "S T"]:
    """Number of edges of each length 1, 2, ... of each neuron of all matrices; NaN where one of them is not finite."""
    counts = []
    for weight in weights:
        finite = torch.isfinite(weight).all()
        for part in weight.split(max(1, CHUNK // max(1, weight.shape[1]))):
            counts.append(torch.where(finite, _rounded_lengths(part, threshold), torch.nan))
    return torch.cat(counts)


def _rounded_lengths(weight: Num[Tensor, "S N"], threshold: float) -> Float[Tensor, "S T"]:
    num_radii = round(threshold)
    lengths = 1 / magnitudes(weight, working_dtype(weight.device))
    kept = (lengths > 1) & (lengths <= threshold)
    # What is not kept is counted as 0, a length that no edge has.
    rounded = torch.where(kept, lengths, 0.0).round().long()
    counts = lengths.new_zeros(len(weight), num_radii + 1)
    return counts.scatter_add_(1, rounded, torch.ones_like(lengths))[:, 1:]


def _scaling(counts: Float[Tensor, "*B S T"], orders: Sequence[float]) -> Scaling:
    kept = counts.sum(-1, keepdim=True) > FEW_EDGES
    masses = torch.where(kept | counts.isnan(), 1 + counts.cumsum(-1), 0.0)
    occurs = (kept & (counts > 0)).any(-2)
    radii = torch.arange(1, counts.shape[-1] + 1, dtype=counts.dtype, device=counts.device)
    return Scaling(
        masses, occurs.to(counts), log_radii=radii.log().expand_as(occurs), per_node=True, orders=tuple(orders)
    )


def published_summary(
    scaling: Scaling, *, drop_hooks: bool = False, drop_non_monotone: bool = False
) -> tuple[Tensor, Tensor]:
    """Position of the spectrum's maximum and its width by forward differences of tau, as published; statistics use
    exact derivatives.

    The steps before and after q = 0 share the maximum of these differences, but their alpha differ by some per cent. In
    the published code, rounding decides between them; here it is the first.

    Args:
        scaling: Scaling with a leading axis of samples, for example; the authors average over it.
        drop_hooks: NaN for spectra with f above 0.
        drop_non_monotone: NaN for spectra whose alpha rises by more than 0.01 above its first value.
    """
    q = scaling.masses.new_tensor(scaling.orders)
    alpha = scaling.tau.diff(dim=-1) / q.diff()
    f = q[:-1] * alpha - scaling.tau[..., :-1]
    dropped = (drop_hooks & (f > 0).any(-1)) | (drop_non_monotone & (alpha.amax(-1) - alpha[..., 0] > 0.01))
    first = (f >= f.amax(-1, keepdim=True) - ROUNDING).int().argmax(-1, keepdim=True)
    alpha0 = alpha.gather(-1, first)[..., 0]
    return torch.where(dropped, torch.nan, alpha0), torch.where(dropped, torch.nan, alpha.amax(-1) - alpha.amin(-1))


def emergence(
    alpha0: Float[Tensor, "*B"],
    width: Float[Tensor, "*B"],
    first_alpha0: Float[Tensor, "*B"],
    first_width: Float[Tensor, "*B"],
) -> Float[Tensor, "*B"]:
    """Degree of emergence: how far a spectrum has widened and moved to the left, `width / first_width * ln(first_alpha0
    / alpha0)`.

    Interpret only the excess over the value for shuffled weights. Growing weights alone raise it, and so does a larger
    sample of the same network.

    Returns:
        Positive if the spectrum has moved to the left. NaN if an alpha0 is not positive, or the first width is below
        0.001.
    """
    meaningful = (alpha0 > 0) & (first_alpha0 > 0) & (first_width >= 1e-3)
    return torch.where(meaningful, width / first_width * (first_alpha0 / alpha0).log(), torch.nan)


def typical_threshold(weights: Sequence[Num[Tensor, "_ _"]]) -> Float[Tensor, ""]:
    """Three over the root mean square of all weights: a threshold that keeps most edges of Gaussian weights, whatever
    their scale.
    """
    squares = torch.stack([magnitudes(weight, working_dtype(weight.device)).square().sum() for weight in weights]).sum()
    return 3 / (squares / sum(weight.numel() for weight in weights)).sqrt()
