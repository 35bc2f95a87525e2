"""How far the width is beyond counting."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import statistic
from lightning_lowrank.statistics.width import width
from lightning_lowrank.statistics.width_floor import width_floor


@statistic(unit="1", comparable=False, misleads="A few extreme neurons determine it.")
def width_over_floor(scaling: Scaling) -> Float[Tensor, "*B"]:
    """Width of the spectrum divided by `width_floor`, the width that identical neurons have from counting finitely many
    weights.

    Unlike the width, it can be compared between layers of different shapes. Like the width, a few extreme neurons
    determine it.

    Args:
        scaling: Of any mode.

    Returns:
        About 1 for independent weights; with few weights per neuron sometimes up to 5. NaN if there is no spectrum (see
        `valid`) or no floor.

    Examples:
        >>> weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        >>> width_over_floor(multifractal_spectrum(weight, direction="in"))
        tensor(1.0288, dtype=torch.float64)

    References:
        This library.
    """
    floor = width_floor(scaling)
    return torch.where(floor > 0, width(scaling) / floor, torch.nan)
