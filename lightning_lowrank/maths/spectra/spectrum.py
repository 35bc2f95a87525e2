"""The value object that every rank is a function of, and the exact ways to one.

Shape letters:  B any batch axes   M rows, N columns of a matrix   K values kept   P probes
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

# The least of a spectrum that a question takes: energy and its square, also the largest value, all values.
Needs = Literal["moments", "top", "values"]

# Entries of a matrix that are multiplied at once: a tall one would take as much memory again, in double precision.
SCRATCH = 2**22

# Rows of a Gram matrix that a CPU computes at once, from the diagonal on; below the second number all of them.
STRIP, SMALL = 64, 128


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a batch of matrices, largest magnitude first, each with its multiplicity.

    Attributes:
        values: Singular values; for symmetric operators `sign(lambda) * sqrt(|lambda|)`. Largest magnitude first:
            `descending` sorts so. NaN for a matrix that was not finite.
        weights: Number of singular values for which each value stands, possibly a fraction; ones if the spectrum is
            whole.
        shape: Rows and columns of the matrix.
        whole: Whether every singular value is included. An estimate or a summary by moments is not whole.
        num_probes: 0 when exact. Otherwise `weights` has a leading axis of this length, one independent estimate each.
            That of `values` has length 1 if all share them, or the same length.
        coarse: The same estimate from half the work. The difference of a statistic between the two is an error that
            more probes would not reduce.
    """

    values: Float[Tensor, "*#B K"]
    weights: Float[Tensor, "*#B K"]
    shape: tuple[int, int]
    whole: bool = True
    num_probes: int = 0
    coarse: "Spectrum | None" = None

    @cached_property
    def magnitudes(self) -> Float[Tensor, "*B K"]:
        """Absolute values, largest first."""
        return self.values.abs()

    @cached_property
    def top(self) -> Float[Tensor, "*B"]:
        """The largest magnitude."""
        return self.magnitudes[..., 0]

    @cached_property
    def unit(self) -> Float[Tensor, "*B K"]:
        """Magnitudes over the largest: between 0 and 1, all 0 for the zero matrix. Scale-free statistics read it."""
        return ratio(self.magnitudes, self.top[..., None])

    @cached_property
    def unit_energies(self) -> Float[Tensor, "*B K"]:
        """Squared norm that each entry of `unit` carries, multiplicity included."""
        return self.weights * self.unit.square()

    @cached_property
    def energy(self) -> Float[Tensor, "*B"]:
        """Squared Frobenius norm."""
        return self.unit_energies.sum(-1) * self.top.square()

    def __getitem__(self, index: object) -> "Spectrum":
        """Some of the batch; the axis of the probes stays."""
        if self.num_probes:
            index = (slice(None), *index) if isinstance(index, tuple) else (slice(None), index)
        return self._at(index)

    def _at(self, index: Any) -> "Spectrum":
        coarse = self.coarse and self.coarse._at(index)
        return replace(self, values=self.values[index], weights=self.weights[index], coarse=coarse)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient, with 0 where the denominator is 0: the rank of the zero matrix is 0."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def unit_vectors(vectors: Num[Tensor, "*B K"]) -> tuple[Num[Tensor, "*B K"], Float[Tensor, "*B"]]:
    """Vectors over their lengths, and the lengths; 0 for the zero vector, NaN for one that is not finite.

    Over the largest entry first: squares leave the range of float32 at entries of 1e19, and of 1e-23.
    """
    if not vectors.shape[-1]:
        return vectors, torch.linalg.vector_norm(vectors, dim=-1)
    # The infinity norm of torch gives the same number, and takes six times as long.
    largest = vectors.abs().amax(-1, keepdim=True)
    scaled = vectors / (largest + (largest == 0))
    lengths = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / (lengths + (lengths == 0)), (largest * lengths)[..., 0]


def lengths_of(vectors: Num[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
    """Euclidean lengths along the last axis, as far as they are within the range of the dtype."""
    return unit_vectors(vectors)[1]


def noise_floor(shape: tuple[int, int]) -> float:
    """What counts as 0 beside 1 in a matrix of that shape held in float32, as `numpy.linalg.matrix_rank` has it."""
    return max(shape) * torch.finfo(torch.float32).eps


def perplexity(masses: Float[Tensor, "*B K"], weights: Float[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
    """Exponential of the entropy of `masses` over their sum: as many equal masses would be as spread out. 0 where all
    are 0.
    """
    total = (weights * masses).sum(-1)
    shares = ratio(masses, total[..., None])
    spread = (weights * torch.special.entr(shares)).sum(-1).exp()
    return torch.where(total == 0, 0.0, spread)


def descending(
    values: Float[Tensor, "*B K"], weights: Float[Tensor, "*P K"]
) -> tuple[Float[Tensor, "*B K"], Float[Tensor, "*P K"]]:
    """The same values, largest magnitude first, with their weights: the order of a `Spectrum`.

    Weights may have an axis in front, of probes that share the values.
    """
    order = values.abs().argsort(-1, descending=True)
    return values.gather(-1, order), weights.gather(-1, order.expand_as(weights))


def pooled(value: Any) -> Any:
    """The mean of an estimate's probes, as one spectrum; an exact one, or another value object, as it is."""
    if not isinstance(value, Spectrum) or not value.num_probes:
        return value
    values, weights = value.values, value.weights / value.num_probes
    if len(values) == 1:
        values, weights = values[0], weights.sum(0)
    else:
        values, weights = descending(*(x.movedim(0, -2).flatten(-2) for x in (values, weights)))
    return replace(value, values=values, weights=weights, num_probes=0, coarse=None)


def working_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it; float32 on MPS, with the error that `svd` states."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no float32 products in fewer bits: these spoil a Gram matrix without a word."""
    with torch.no_grad(), _products_in_full():
        if torch.amp.is_autocast_available(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


@contextmanager
def _products_in_full() -> Iterator[None]:
    """Float32 products in float32, whatever `torch.set_float32_matmul_precision` or the settings of backends allow."""
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody set it for a backend
        overall = ""
    if overall == "highest":
        yield
        return
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    before = {backend: backend.fp32_precision for backend in backends if hasattr(backend, "fp32_precision")}
    try:
        if overall:
            torch.set_float32_matmul_precision("highest")
        else:
            for backend in before:
                backend.fp32_precision = "ieee"
        yield
    finally:
        if overall:
            torch.set_float32_matmul_precision(overall)
        for backend, bits in before.items():
            backend.fp32_precision = bits


def svd(matrix: Num[Tensor, "*B M N"], *, dtype: torch.dtype | None = None) -> Spectrum:
    """All singular values, from the Gram matrix of the short side.

    Relative to a float64 SVD, every rank is within 1e-6 up to condition numbers of 1e8 (float64 work). Devices without
    float64 need `dtype=torch.float32`. Each singular value below about `4e-4` of the largest is then noise. Ranks of
    energies stay within 1e-5, but `effective_rank` and the nuclear norm are up to 20 % too high on steep spectra.

    Args:
        matrix: Any floating or complex dtype, any strides. A matrix with NaN or Inf gives NaN values and does not
            affect the rest of its batch.
        dtype: Dtype of the computation; float64 if the device supports it.

    Returns:
        `min(M, N)` values; a single 0 if `min(M, N)` is 0.

    Examples:
        >>> svd(torch.diag(torch.tensor([3.0, 4.0]))).values
        tensor([4., 3.], dtype=torch.float64)
    """
    if not isinstance(matrix, Tensor) or matrix.ndim < 2:
        given = (
            f"a tensor of shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else f"a {type(matrix).__name__}"
        )
        raise ValueError(f"svd needs a tensor [..., rows, columns], such as torch.as_tensor(matrix); this is {given}")
    rows, columns = matrix.shape[-2:]
    if min(rows, columns) == 0:
        return _empty(matrix, (rows, columns))
    with full_precision(matrix.device):
        gram, scale = short_gram(matrix, dtype or working_dtype(matrix.device))
        return from_gram(gram, shape=(rows, columns), scale=scale)


def short_gram(matrix: Num[Tensor, "*B M N"], dtype: torch.dtype) -> tuple[Num[Tensor, "*B S S"], Float[Tensor, "*B"]]:
    """Gram matrix of the short side S of the matrix over `scale`, and that scale: the largest entry, or 1 where none is
    needed.

    Squares of entries leave float32's range at 1e19, and float64's at 1e154; what was stored in 32 bits is safe in 64.
    """
    short = _short(matrix, torch.promote_types(matrix.dtype, dtype))
    if _safe(matrix, short.dtype):
        return short @ short.mH, torch.ones(matrix.shape[:-2], dtype=dtype, device=matrix.device)
    scale = _scale(short.abs().amax((-2, -1)))
    short = short / scale[..., None, None]
    return short @ short.mH, scale


def short_grams(
    matrices: Sequence[Tensor], dtype: torch.dtype, *, upper: bool = False
) -> tuple[Float[Tensor, "G S S"], Float[Tensor, " G"] | None]:
    """The same of real matrices that share the short side S, one after the other in one buffer; no scale where none is
    needed.

    One scratch buffer serves all: fresh memory for each matrix would cost as much as the product.

    Args:
        matrices: `[*B, M, N]` each.
        dtype: What to work in.
        upper: Nobody reads below the diagonal: anything may stand there, which saves up to half of the products on CPU.
    """
    for matrix in matrices:
        dtype = torch.promote_types(matrix.dtype, dtype)
    flat = [matrix.reshape(-1, *matrix.shape[-2:]) for matrix in matrices]
    sizes, short = [len(matrix) for matrix in flat], min(flat[0].shape[-2:])
    scale: Tensor | None = None
    inverses: Sequence[Tensor | None] = [None] * len(flat)
    if not all(_safe(matrix, dtype) for matrix in flat):
        scale = _scale(torch.cat([torch.maximum(m.amax((-2, -1)), -m.amin((-2, -1))) for m in flat]).to(dtype))
        inverses = scale.reciprocal()[:, None, None].split(sizes)
    gram = torch.empty(sum(sizes), short, short, dtype=dtype, device=flat[0].device)
    scratch = torch.empty(
        min(max(m.numel() for m in flat), max(SCRATCH, max(sizes) * short)), dtype=dtype, device=flat[0].device
    )
    for matrix, inverse, out in zip(flat, inverses, gram.split(sizes), strict=True):
        long = matrix if matrix.shape[-2] == short else matrix.mT
        step = max(1, scratch.numel() // (len(long) * short))
        for begin in range(0, max(1, long.shape[-1]), step):
            part = long[..., begin : begin + step]
            # In the order of the matrix in memory.
            wide = (
                scratch[: part.numel()].view(part.mT.shape).mT
                if long is not matrix
                else scratch[: part.numel()].view(part.shape)
            )
            wide.copy_(part) if inverse is None else torch.mul(part.to(dtype), inverse, out=wide)
            _add_products(out, wide, beta=float(begin > 0), upper=upper)
    return gram, scale


def _add_products(gram: Float[Tensor, "*B S S"], wide: Float[Tensor, "*B S L"], *, beta: float, upper: bool) -> None:
    """`wide wide^T + beta * gram` in the place of `gram`."""
    short = gram.shape[-1]
    strips = upper and gram.device.type == "cpu" and short >= SMALL
    height = min(STRIP, -(-short // 4)) if strips else short
    for first in range(0, short, height):
        rows = slice(first, first + height)
        out = gram[..., rows, first:]
        torch.baddbmm(out, wide[..., rows, :], wide[..., first:, :].mT, beta=beta, out=out)


def _short(matrix: Num[Tensor, "*B M N"], dtype: torch.dtype) -> Num[Tensor, "*B S L"]:
    """No fewer columns than rows."""
    return (matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT).to(dtype)


def _safe(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fourth power of no entry can leave the range of a dtype."""
    return dtype in (torch.float64, torch.complex128) and matrix.element_size() <= (8 if matrix.is_complex() else 4)


def _scale(largest: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """What to divide by, its reciprocal finite too."""
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.where(usable, largest.clamp(min=torch.finfo(largest.dtype).tiny), 1.0)


def from_gram(
    gram: Num[Tensor, "*B S S"], *, shape: tuple[int, int] | None = None, scale: Float[Tensor, "*B"] | None = None
) -> Spectrum:
    """Spectrum of `scale * A`, given `A A^H` or `A^H A` for either side of A.

    Args:
        gram: Symmetric or Hermitian, positive semi-definite up to rounding; negative eigenvalues count as 0.
        shape: Rows and columns of A; default `(S, S)`. Only the `min(shape)` largest values are kept.
        scale: Factor on the singular values; default 1.

    Examples:
        >>> from_gram(torch.tensor([[4.0, 0.0], [0.0, 9.0]])).values
        tensor([3., 2.])
    """
    shape = shape or (gram.shape[-1], gram.shape[-1])
    with full_precision(gram.device):
        kept = min(gram.shape[-1], *shape)
        values = eigenvalues(gram).flip(-1)[..., :kept].clamp(min=0).sqrt()
        if scale is not None:
            values = values * scale[..., None]
    return Spectrum(values, torch.ones_like(values), shape)


def eigenvalues(symmetric: Num[Tensor, "*B S S"]) -> Float[Tensor, "*B S"]:
    """Eigenvalues, ascending; NaN for a matrix that is not finite or that the solver gives up on, without harm to its
    batch.
    """
    return _solved(symmetric, _values)[0]


def eigenvalues_of_grams(grams: Float[Tensor, "*B S S"]) -> Float[Tensor, "*B S"]:
    """The same of Gram matrices: only their upper triangle is read, and no copy is made, for they may be changed."""
    # What is not finite in a matrix is so in the square of its row.
    finite = torch.isfinite(grams.diagonal(dim1=-2, dim2=-1).sum(-1))
    return _of_finite(grams.masked_fill_(~finite[..., None, None], 0.0), finite, _values)[0]


def eigenvectors(symmetric: Num[Tensor, "*B S S"]) -> tuple[Float[Tensor, "*B S"], Num[Tensor, "*B S S"]]:
    """Eigenvalues, ascending, and eigenvectors as columns; NaN as in `eigenvalues`."""
    values, vectors = _solved(symmetric, torch.linalg.eigh)
    return values, vectors


def _values(symmetric: Tensor) -> tuple[Tensor, ...]:
    # The upper triangle: a tenth faster than the lower one on CPU.
    return (torch.linalg.eigvalsh(symmetric, UPLO="U"),)


def _solved(symmetric: Tensor, solver: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    finite = torch.isfinite(symmetric.sum((-2, -1), dtype=_accumulator(symmetric)))
    return _of_finite(symmetric.masked_fill(~finite[..., None, None], 0.0), finite, solver)


def _of_finite(
    safe: Tensor, finite: Bool[Tensor, "*B"], solver: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What the solver finds, NaN for those that were not finite, in whose place there are zeros."""
    try:
        results = tuple(solver(safe))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        results = _one_by_one(safe, solver)
    return tuple(
        torch.where(finite.reshape(finite.shape + (1,) * (r.ndim - finite.ndim)), r, torch.nan) for r in results
    )


def _accumulator(tensor: Tensor) -> torch.dtype:
    """In which a sum of finite entries is finite."""
    return torch.promote_types(tensor.dtype, working_dtype(tensor.device))


def _one_by_one(symmetric: Tensor, solver: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The same where one matrix of the batch made the solver fail: only that one is lost."""
    flat = symmetric.reshape(-1, *symmetric.shape[-2:])
    results = []
    for one in flat:
        try:
            results.append(tuple(solver(one)))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # The solution of the zero matrix has the shapes and dtypes that are due.
            results.append(tuple(torch.full_like(r, torch.nan) for r in solver(torch.zeros_like(one))))
    return tuple(
        torch.stack(parts).reshape(*symmetric.shape[:-2], *parts[0].shape) for parts in zip(*results, strict=True)
    )


def _empty(matrix: Num[Tensor, "*B M N"], shape: tuple[int, int]) -> Spectrum:
    """The spectrum of a matrix without entries: one value, 0."""
    zero = torch.zeros(*matrix.shape[:-2], 1, dtype=working_dtype(matrix.device), device=matrix.device)
    return Spectrum(zero, torch.ones_like(zero), shape)
