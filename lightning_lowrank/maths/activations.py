"""Statistics of a layer's units over a batch.

Shape letters:  B any batch axes   U units of a layer
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import ratio

# Below this share of the layer's mean a unit counts as dormant.
TAU = 0.025


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

    Example:
        >>> dormant_share(torch.tensor([1.0, 1.0, 0.0, 0.01]))
        tensor(0.5000)

    References:
        Sokar et al. (2023), Definition 3.2; tau = 0.025 is what they use for DQN (Appendix B).
    """
    scores = dormancy_scores(mean_magnitudes)
    share = (scores <= tau).to(scores).mean(-1)
    return torch.where(mean_magnitudes.isfinite().all(-1), share, torch.nan)
