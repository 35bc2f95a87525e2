"""A spectrum in a few numbers: singular values at fixed ranks, to be drawn beside those of noise.

Shape letters:  B any batch axes   R ranks that are kept
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.marchenko_pastur import null
from lightning_lowrank.maths.spectra.spectrum import Spectrum, pooled

COUNT = 32


@lru_cache(maxsize=4096)
def ranks(short: int) -> tuple[int, ...]:
    """Which of `short` singular values are kept, the largest being number 0: all of up to 32, otherwise 32 that grow
    apart quadratically.

    The largest one and the smallest one are always among them.

    Examples:
        >>> ranks(3), ranks(64)[-5:]
        ((0, 1, 2), (48, 51, 55, 59, 63))
    """
    kept = min(COUNT, max(short, 1))
    spread = (round((short - 1) * (i / (kept - 1)) ** 2) if kept > 1 else 0 for i in range(kept))
    return tuple(max(i, rank) for i, rank in enumerate(spread)) if short > kept else tuple(range(kept))


def order_statistics(spectrum: Spectrum) -> Float[Tensor, "R *B"]:
    """Frobenius norm, then the singular values at `ranks`; behind those of a short spectrum NaN.

    Of an estimate, each is the value below which the weights say that as many lie.
    """
    spectrum = pooled(spectrum)
    at = _index(min(spectrum.shape), spectrum.values.device)
    values = spectrum.magnitudes
    if spectrum.whole:
        kept = values.index_select(-1, at)
    else:
        filled = spectrum.weights.cumsum(-1)
        asked = (at + 0.5).to(filled).expand(*filled.shape[:-1], -1).contiguous()
        kept = values.gather(-1, torch.searchsorted(filled, asked).clamp(max=values.shape[-1] - 1))
    rows = torch.cat([spectrum.energy.sqrt()[..., None], kept], -1)
    return torch.nn.functional.pad(rows, (0, COUNT - kept.shape[-1]), value=torch.nan).movedim(-1, 0)


@lru_cache(maxsize=4096)
def _index(short: int, device: torch.device) -> Tensor:
    """Made once: moving it to the device means to wait for it."""
    return torch.tensor(ranks(short), device=device)


def of_noise(shape: tuple[int, int]) -> Float[Tensor, " R"]:
    """What a Gaussian matrix of that shape and of Frobenius norm 1 has at `ranks`."""
    return order_statistics(null(shape))[1:]
