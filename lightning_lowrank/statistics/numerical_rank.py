"""Numerical rank."""

from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import Spectrum, noise_floor
from lightning_lowrank.statistics.registry import statistic


@statistic(
    unit="directions",
    counts=True,
    tail=True,
    reads_shape=True,
    misleads="Entries that were rounded to bfloat16 or float16 make it full.",
)
def numerical_rank(spectrum: Spectrum) -> Float[Tensor, "*B"]:
    """Number of singular values above `max(M, N) * 2**-23` times the largest one.

    The threshold uses the rounding unit of float32, whatever the dtype of the matrix. A Gram matrix in float64 cannot
    distinguish values below 1e-8 of the largest one from 0. Entries rounded to bfloat16 or float16 give noise far above
    this threshold, so such a matrix has full numerical rank.

    Args:
        spectrum: Must be whole; NaN for a sketch.

    Returns:
        An integer between 1 and `min(M, N)`; 0 for a zero matrix.

    Examples:
        >>> numerical_rank(svd(torch.ones(4, 4)))
        tensor(1., dtype=torch.float64)

    References:
        Golub & Van Loan (2013), Matrix Computations, Section 5.4.1; the threshold is that of `numpy.linalg.matrix_rank`
        for float32.
    """
    return (spectrum.weights * (spectrum.unit > noise_floor(spectrum.shape))).sum(-1)
