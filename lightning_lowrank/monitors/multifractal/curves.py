"""What the tab draws of a scaling: its spectrum, the partition function with its fits, and how the neurons' own
dimensions are spread.

Shape letters:  B any batch axes   S nodes   R radii   P of them that are drawn   Q orders   C cells of a histogram
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lowrank.maths.scaling.scaling import ORDERS, Scaling
from lightning_lowrank.measuring.number_source import Curve

# Vectors over every second order q.
SPECTRUM = ("tau", "dimensions", "alpha", "f")

# Orders whose partition functions are drawn: at 0 it is constant.
DRAWN = (-2.0, -1.0, 1.0, 2.0)

# So many radii, which in rank mode is all; and cells, of a width that is more than rounding.
POINTS, CELLS, NARROWEST = 24, 24, 1e-3


def curves(source: str, *, histogram: bool) -> list[Curve]:
    """Names and axes of what `vectors` gives.

    Args:
        source: What the names begin with.
        histogram: The neurons' dimensions are also one of TensorBoard's histograms, a tag for each site.
    """
    points, cells = (tuple(map(float, range(count))) for count in (POINTS, CELLS))
    middles = f"{source}_neuron_dimension"
    counts = [Curve(f"{middles}_counts", cells, middles)] if histogram else []
    return [
        *(Curve(f"{source}_{name}", ORDERS[::2]) for name in SPECTRUM),
        Curve(f"{source}_log_radius", points),
        Curve(f"{source}_log_partition", tuple(q for q in DRAWN for _ in range(POINTS))),
        Curve(f"{source}_log_partition_fit", tuple(q for q in DRAWN for _ in range(2))),
        Curve(middles, cells),
        Curve(f"{middles}_density", cells),
        *counts,
    ]


def vectors(source: str, scaling: Scaling) -> dict[str, Float[Tensor, "*B _"]]:
    """Spectra, NaN where there are none; `ln Z_q` at radii from the smallest to the largest, with both ends of each
    line; a histogram.
    """
    spectrum = {
        name: torch.where(scaling.valid[..., None], getattr(scaling, name), torch.nan)[..., ::2] for name in SPECTRUM
    }
    drawn = spectrum | _partition(scaling) | _histogram(scaling.node_dimensions)
    return {f"{source}_{name}": row for name, row in drawn.items()}


def _partition(scaling: Scaling) -> dict[str, Float[Tensor, "*B _"]]:
    """The partition function at some radii and orders, and the line fitted to it; NaN where there is no fit."""
    orders = [scaling.orders.index(q) for q in DRAWN]
    log_partition, radii = scaling.log_partition[..., orders, :], _radii(scaling)
    has_fit = ~scaling.slope_weights[..., :1].isnan()  # [*B, 1]
    log_radius = torch.where(has_fit, scaling.abscissa.gather(-1, radii), torch.nan)  # [*B, P]
    at_every_order = radii[..., None, :].expand(*log_partition.shape[:-1], -1)  # [*B, D, P]
    points = torch.where(has_fit[..., None, :], log_partition.gather(-1, at_every_order), torch.nan)
    # A line goes through the mean of what it is fitted to.
    ends = log_radius[..., None, [0, -1]] - scaling.mean_over_radii(scaling.abscissa)[..., None, None]
    lines = scaling.mean_over_radii(log_partition)[..., None] + scaling.tau[..., orders, None] * ends
    return {
        "log_radius": log_radius,
        "log_partition": points.flatten(-2),
        "log_partition_fit": lines.flatten(-2),
    }


def _radii(scaling: Scaling) -> Int[Tensor, "*B P"]:
    """Numbers of radii that fits read, as evenly spread as there are."""
    x, read = scaling.abscissa, scaling.fit > 0
    low, high = torch.where(read, x, torch.inf).amin(-1), torch.where(read, x, -torch.inf).amax(-1)
    wanted = low[..., None] + (high - low)[..., None] * torch.linspace(0, 1, POINTS, dtype=x.dtype, device=x.device)
    apart = (x[..., None, :] - wanted[..., None]).abs()
    return torch.where(read[..., None, :], apart, torch.inf).argmin(-1)


def _histogram(numbers: Float[Tensor, "*B S"]) -> dict[str, Float[Tensor, "*B C"]]:
    """Middles of cells between the least and the largest, and what lies in each; the density adds up to 1 whatever
    their width.
    """
    known = torch.isfinite(numbers)
    low, high = torch.where(known, numbers, torch.inf).amin(-1), torch.where(known, numbers, -torch.inf).amax(-1)
    width = ((high - low) / CELLS).clamp(min=NARROWEST)[..., None]
    cells = torch.arange(CELLS, dtype=numbers.dtype, device=numbers.device)
    places = ((numbers - low[..., None]) / width).floor().clamp(0, CELLS - 1)
    counts = (places[..., None] == cells).sum(-2).to(numbers)
    middles, total = low[..., None] + width * (cells + 0.5), known.sum(-1, keepdim=True)
    rows = {
        "neuron_dimension": middles,
        "neuron_dimension_counts": counts,
        "neuron_dimension_density": counts / total / width,
    }
    return {name: torch.where(total > 0, row, torch.nan) for name, row in rows.items()}
