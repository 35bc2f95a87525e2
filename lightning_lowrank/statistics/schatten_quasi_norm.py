"""Schatten quasi-norm."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.statistics.registry import statistic


@statistic(
    unit="entries",
    scale_free=False,
    parameter="p",
    domain=(0.0, 2.0),
    tail=lambda p: p < 1,
    misleads="Below p = 1 the smallest singular values, which are least exact, count most.",
)
def schatten_quasi_norm(spectrum: Spectrum, *, p: float = 0.5) -> Float[Tensor, "*B"]:
    """The `p`-th root of the sum of the singular values to the power `p`.

    It is the nuclear norm for p = 1 and the Frobenius norm for p = 2, and it is a norm for p of at least 1. The minimal
    mean squared Frobenius norm of k factors of a matrix has `p = 2 / k`. Below 1 the smallest values count most. Each
    singular value with an error of 1e-8 of the largest (float64 Gram matrix) adds up to `1e-8 ** p` to a sum that is at
    least 1. For p below about 0.01, the result overflows and is Inf.

    Args:
        spectrum: Must be whole if `p` is below 1; otherwise the result is NaN.
        p: Above 0, up to 2.

    Returns:
        At least the spectral norm; 0 for a zero matrix.

    Examples:
        >>> schatten_quasi_norm(svd(torch.diag(torch.tensor([4.0, 9.0]))), p=0.5)
        tensor(25.0000, dtype=torch.float64)

    References:
        Srebro, Rennie & Jaakkola (2004) for p = 1 and two factors; Shang et al. (2016), arXiv:1611.00925, for k of
        them.
    """
    return spectrum.top * (spectrum.weights * spectrum.unit**p).sum(-1) ** (1 / p)
