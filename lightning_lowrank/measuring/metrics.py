"""Statistics as torchmetrics: one class per way of accumulating, whatever the formula.

Shape letters:  B any batch axes   M rows, N columns of a matrix   S sites   Q quantities   R rows of data
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lightning_lowrank.maths.scaling.multifractal import multifractal_spectrum
from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.maths.spectra.spectrum import Spectrum, from_gram, full_precision, svd
from lightning_lowrank.maths.spectra.subspaces import Subspace, top_subspace
from lightning_lowrank.statistics import find


def state_dtype() -> torch.dtype:
    """float64, unless the machine has a device that cannot hold it."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64


class SpectralStatistic(Metric):
    """Mean of one statistic over all matrices seen.

    Args:
        statistic: A name such as `stable_rank`, `energy_rank_0.01` or `relative_stable_rank`.
        k: Number of directions to keep if the statistic compares subspaces.
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: There is no such statistic; the message lists those that exist.

    Examples:
        >>> metric = SpectralStatistic("stable_rank")
        >>> metric.update(torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0])))
        >>> metric.compute()
        tensor(1.5000, dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False
    # TorchScript compiles properties of modules, and with them those of a module that holds this one.
    __jit_unused_properties__: ClassVar[list[str]] = [*Metric.__jit_unused_properties__, "total"]
    count: Tensor

    def __init__(self, statistic: str, *, k: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.statistic, self.k = find(statistic), k
        # A MetricCollection feeds only one of the metrics whose states are equal after the first batch, and of the
        # identity all ranks are: what two statistics add up needs two names.
        self._sum = f"sum_of_{self.statistic.name}_{k}"
        self.add_state(self._sum, torch.zeros((), dtype=state_dtype()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=state_dtype()), dist_reduce_fx="sum")

    def update(self, *matrices: Tensor | Spectrum | Subspace | Scaling) -> None:
        """Add a batch of matrices [..., rows, columns], or two of them for a statistic of a pair. The value objects of
        the statistic are accepted, too.
        """
        if len(matrices) != len(self.statistic.takes):
            raise ValueError(
                f"{self.statistic.name} needs {len(self.statistic.takes)} batches of matrices, not {len(matrices)}"
            )
        for matrix in matrices:
            if isinstance(matrix, Tensor) and matrix.ndim < 2:
                shape = tuple(matrix.shape)
                raise ValueError(
                    f"{self.statistic.name} needs matrices [..., rows, columns]; this tensor has the shape {shape}"
                )
        pairs = zip(self.statistic.takes, matrices, strict=True)
        values = self.statistic(*(self._value(kind, m.detach()) if isinstance(m, Tensor) else m for kind, m in pairs))
        setattr(self, self._sum, self.total + values.sum().to(self.total))
        self.count += values.numel()

    def compute(self) -> Float[Tensor, ""]:
        """The mean; NaN before the first update."""
        return self.total / self.count

    @property
    def total(self) -> Tensor:
        """Sum over all matrices seen."""
        return getattr(self, self._sum)  # type: ignore[no-any-return]

    def _value(self, kind: type, matrix: Tensor) -> Spectrum | Subspace | Scaling:
        if kind is Scaling:
            return multifractal_spectrum(matrix)
        return top_subspace(matrix, self.k) if kind is Subspace else svd(matrix)


class SiteMeans(Metric):
    """Mean of each of Q quantities at each of S sites, over updates and over processes.

    Args:
        num_quantities: Q.
        num_sites: S.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, num_quantities: int, num_sites: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(num_quantities, num_sites, dtype=state_dtype()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_sites, dtype=state_dtype()), dist_reduce_fx="sum")

    def update(self, values: Float[Tensor, "Q n"], sites: Sequence[int]) -> None:
        """Add one number per quantity for each of n sites."""
        columns = _index(tuple(sites), self.total.device)
        # Memory first: a total that goes without its count would make a number of what is none.
        values, ones = values.detach().to(self.total), torch.ones_like(columns, dtype=self.count.dtype)
        self.total.index_add_(1, columns, values)
        self.count.index_add_(0, columns, ones)

    def compute(self) -> Float[Tensor, "Q S"]:
        """The means; NaN at sites that were never seen."""
        return self.total / self.count


@lru_cache(maxsize=1024)
def _index(sites: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices of the sites on the device; cached, because moving them there at every sample would wait for it."""
    return torch.tensor(sites, device=device)


class Gram(Metric):
    """Sum of outer products of all rows, over updates and over processes: pool first, compute the rank last.

    Args:
        width: Length of a row.
        kwargs: Arguments of `torchmetrics.Metric`.

    Examples:
        >>> metric = Gram(2)
        >>> metric.update(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> metric.spectrum().values
        tensor([4., 3.], dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor
    rows: Tensor

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.add_state("sums", torch.zeros(width + 1, width, dtype=state_dtype()), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=state_dtype()), dist_reduce_fx="sum")

    def update(self, rows: Float[Tensor, "*B N"]) -> None:
        """Add rows; all axes except the last one number them."""
        add_rows(self.sums, rows)
        self.rows += rows.shape[:-1].numel()

    def compute(self) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"], Float[Tensor, ""]]:
        """The Gram matrix, the sum of all rows and their number."""
        return self.sums[:-1], self.sums[-1], self.rows

    def spectrum(self, *, centred: bool = False, num_rows: int | None = None) -> Spectrum:
        """Singular values of the matrix of all rows. Communicates if there are several processes.

        Args:
            centred: Whether to subtract the mean of the rows.
            num_rows: Number of rows on all processes, if known. Otherwise it is read from the device, which waits for
                it.
        """
        gram, total, rows = self.compute()
        # torchmetrics makes a single number of a single entry.
        sums = torch.cat([gram.reshape(self.width, self.width), total.reshape(1, self.width)])
        return spectrum_of_rows(sums, num_rows=int(rows) if num_rows is None else num_rows, centred=centred)


def spectrum_of_rows(sums: Float[Tensor, "_ N"], *, num_rows: int, centred: bool) -> Spectrum:
    """Singular values of a matrix of rows, as they are or about their mean, from their Gram matrix and their sum."""
    gram, total = sums[:-1], sums[-1]
    if centred:
        gram = gram - torch.outer(total, total) / max(num_rows, 1)
    return from_gram(gram, shape=(num_rows, gram.shape[-1]))


def add_rows(sums: Float[Tensor, "_ N"], rows: Float[Tensor, "*B N"]) -> None:
    """Add rows to their Gram matrix and, below it, to their sum; all axes but the last count them."""
    with full_precision(rows.device):
        # Products of sparse tensors warn.
        flat = (rows.to_dense() if rows.layout != torch.strided else rows).detach().flatten(0, -2).to(sums)
        sums[:-1].addmm_(flat.mT, flat)
        sums[-1] += flat.sum(0)
