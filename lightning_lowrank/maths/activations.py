"""Statistics of a layer's units over a batch.

Shape letters:  B any batch axes   U units of a layer
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import ratio

# Below this share of the layer's mean a unit counts as dormant.
TAU = 0.025
# Channels that are larger than the median one by this factor are massive.
MASSIVE = 100.0


def dormancy_scores(mean_magnitudes: Float[Tensor, "*B U"]) -> Float[Tensor, "*B U"]:
    """Mean magnitude of each unit's activation over that of all units of the layer.

    Args:
        mean_magnitudes: Mean over inputs of the absolute activation of each unit.

    Returns:
        At least 0, with mean 1 over units; 0 for all units of a layer that is silent.

    References:
        Sokar et al. (2023), The Dormant Neuron Phenomenon in Deep Reinforcement Learning, Definition 3.1.
    """
    return ratio(mean_magnitudes, mean_magnitudes.mean(-1, keepdim=True))


def dormant_share(mean_magnitudes: Float[Tensor, "*B U"], tau: float = TAU) -> Float[Tensor, "*B"]:
    """Share of units whose dormancy score is at most `tau`.

    Returns:
        Between 0 and 1; 1 for a layer that is silent, NaN where an activation is not finite.

    Examples:
        >>> dormant_share(torch.tensor([1.0, 1.0, 0.0, 0.01]))
        tensor(0.5000)

    References:
        Sokar et al. (2023), Definition 3.2; tau = 0.025 is what they use for DQN (Appendix B).
    """
    scores = dormancy_scores(mean_magnitudes)
    share = (scores <= tau).to(scores).mean(-1)
    return torch.where(mean_magnitudes.isfinite().all(-1), share, torch.nan)


def massive_ratio(tops: Float[Tensor, "*B U"]) -> Float[Tensor, "*B"]:
    """Largest channel over the median channel, each by its largest magnitude.

    Returns:
        At least 1, near 1 for Gaussian channels; 0 where the median channel is silent, NaN where one is not finite.

    Examples:
        >>> massive_ratio(torch.tensor([1.0, 2.0, 300.0]))
        tensor(150.)

    References:
        Sun et al. (2024), Massive Activations in Large Language Models, arXiv 2402.17762, Section 2.
    """
    return _finite(tops, ratio(tops.amax(-1), tops.quantile(0.5, -1)))


def massive_count(tops: Float[Tensor, "*B U"], factor: float = MASSIVE) -> Float[Tensor, "*B"]:
    """How many channels are above `factor` times the median channel, each by its largest magnitude.

    Returns:
        Less than half of the channels; 0 where the median channel is silent, NaN where one is not finite.
    """
    scores = ratio(tops, tops.quantile(0.5, -1, keepdim=True))
    return _finite(tops, (scores > factor).to(tops).sum(-1))


def channel_kurtosis(mean_squares: Float[Tensor, "*B U"]) -> Float[Tensor, "*B"]:
    """Mean of the squared mean squares of channels over the square of their mean: how unequal channels are.

    Returns:
        From 1, where all are equal, to U, where one has everything; 0 for a silent layer.

    Examples:
        >>> channel_kurtosis(torch.tensor([0.0, 0.0, 4.0]))
        tensor(3.)

    References:
        He et al. (2024), Understanding and Minimising Outlier Features in Transformer Training, NeurIPS, equation 1.
    """
    shares = ratio(mean_squares, mean_squares.mean(-1, keepdim=True))
    return shares.square().mean(-1)


def row_uniformity(matrix: Float[Tensor, "*B M N"]) -> Float[Tensor, "*B"]:
    """Participation ratio of the squared norms of rows, over the number of rows.

    Returns:
        From 1 / M, where one row has everything, to 1, where all are as long; about N / (N + 2) for Gaussian entries; 0
        for zeros.

    Examples:
        >>> row_uniformity(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        tensor(0.6667)
    """
    energies = torch.linalg.vector_norm(matrix, dim=-1).square()
    return ratio(energies.sum(-1).square(), energies.square().sum(-1) * matrix.shape[-2])


def _finite(values: Float[Tensor, "*B U"], found: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    return torch.where(values.isfinite().all(-1), found, torch.nan)
