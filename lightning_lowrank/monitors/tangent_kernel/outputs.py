"""What a tangent kernel is of: the rows of outputs that count, of all processes, some of the columns where they are
many, and the labels.

Shape letters:  R rows of all processes' outputs   S rows of one process   C columns of them   c columns that are looked
at
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.output_loss import ClosedForm, OutputLoss
from lightning_lowrank.maths.operators.operators import (
    Jacobian,
    Layout,
    Operator,
    RowsToRows,
    gauss_newton,
    output_gauss_newton,
)
from lightning_lowrank.monitors.tangent_kernel.kernels import KernelName, sampled_outputs

# Columns of labels, beyond which they are not compared with a kernel of examples.
MANY = 1024


@dataclass(frozen=True)
class KernelOutputs:
    """The outputs of a kernel, the same on every process.

    Attributes:
        jacobian: Of the rows that count.
        labels: What these outputs are to become; None where the loss does not say, or says it of outputs that are not
            looked at.
        gauss_newton: Matrix of the loss, in the space of outputs or of parameters, whichever is smaller: its
            eigenvalues other than 0.
        layout: Of the parameters.
        rounding: Distance from 1 to the next number in the dtype that the outputs were given in.
    """

    jacobian: Jacobian
    labels: Float[Tensor, "R C"] | None
    gauss_newton: Operator
    layout: Layout
    rounding: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.jacobian.outputs.shape
        return rows, columns


@dataclass(frozen=True)
class Place:
    """The position of this process's rows among those of all.

    Attributes:
        before: Rows of the processes before it.
        after: Rows of those after it.
    """

    before: int
    after: int
    team: Team

    @classmethod
    def of(cls, sizes: Sequence[int], team: Team) -> "Place":
        """The position of this process, from the numbers of rows of all."""
        return cls(sum(sizes[: team.rank]), sum(sizes[team.rank + 1 :]), team)

    def alone(self, rows: Float[Tensor, "S C"]) -> Float[Tensor, "R C"]:
        """With zeros in the places of the others'."""
        return rows if self.team.size == 1 else pad(rows, (0, 0, self.before, self.after))

    def own(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, "S C"]:
        """Those of this process."""
        return rows[self.before : len(rows) - self.after]

    def everywhere(self, rows: Float[Tensor, "S C"]) -> Float[Tensor, "R C"]:
        """All rows, on every process."""
        return self.team.all_reduce(self.alone(rows).contiguous())


@dataclass(frozen=True)
class OwnOutputs:
    """The outputs of this process.

    Attributes:
        loss: As a function of all of them.
        rows: Those that the kernel is of, with their graph.
        labels: What they are to become.
        whole: They are all there are.
        apart: Each of them has a row of the kernel.
    """

    loss: OutputLoss
    rows: Float[Tensor, "S c"]
    labels: Float[Tensor, "S C"] | None
    whole: bool
    apart: bool

    @classmethod
    def of(cls, loss: OutputLoss, kernel: KernelName, *, num_columns: int, seed: int) -> "OwnOutputs":
        """The rows that have a share in the loss; waits for the device.

        Args:
            num_columns: If there are more columns than that, so many are drawn; not for the sum of the outputs.
            seed: Of what is drawn.
        """
        counted, labels = loss.counted, loss.labels()
        complete = bool(counted.all())
        rows = loss.outputs if complete else loss.outputs[counted]
        labels = labels if complete or labels is None else labels[counted]
        drawn = kernel != "sum_of_logits" and num_columns < rows.shape[1]
        if drawn:
            rows = sampled_outputs(rows, num_columns, generator=torch.Generator(rows.device).manual_seed(seed))
        apart = kernel == "full"
        return cls(loss, rows, None if drawn and apart else labels, complete and not drawn, apart)

    @property
    def word(self) -> tuple[int, int, tuple[object, ...]]:
        """Rows of the loss and of the kernel, and what has to be the same on every process."""
        return (
            len(self.loss.outputs),
            len(self.rows),
            (self.rows.shape[1], type(self.loss).__name__, self.labels is None),
        )


def kernel_outputs(own: OwnOutputs | None, named: Mapping[str, Tensor], team: Team) -> KernelOutputs | None:
    """The outputs of a kernel. All processes must call it.

    Args:
        own: None where this process has none.
        named: Parameters by name.

    Returns:
        None on every process where one of them has none, or outputs of another kind.
    """
    words = [word for word in team.all_gather_object(None if own is None else own.word) if word is not None]
    if own is None or len(words) < team.size or len({kind for _, _, kind in words}) > 1:
        return None
    of_loss, place = (
        Place.of(sizes, team) for sizes in ([rows for rows, _, _ in words], [rows for _, rows, _ in words])
    )
    everything = _jacobian(own.loss.outputs, of_loss, named)
    # Together, so that each process decides alike: the graph of the products is made once.
    jacobian = everything if own.whole and of_loss == place else _jacobian(own.rows, place, named)
    return KernelOutputs(
        jacobian,
        _labels(own, place, jacobian.dtype),
        _gauss_newton(own.loss, everything, of_loss),
        Layout.of(named),
        torch.finfo(own.loss.outputs.dtype).eps,
    )


def _labels(own: OwnOutputs, place: Place, dtype: torch.dtype) -> Float[Tensor, "R c"] | None:
    """Rows without the columns that are zero in all of them; of a vocabulary, few are left."""
    if own.labels is None:
        return None
    labels = place.everywhere(own.labels.to(dtype))
    if own.apart:
        return labels
    seen = labels.any(0)
    seen[0] = True
    labels = labels[:, seen]
    return labels if labels.shape[1] <= MANY else None


def _jacobian(outputs: Float[Tensor, "S C"], place: Place, named: Mapping[str, Tensor]) -> Jacobian:
    # In bfloat16 every product would be rounded once more on its way in and out.
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return Jacobian(place.alone(wide), list(named.values()), place.team.all_reduce if place.team.size > 1 else None)


def _gauss_newton(loss: OutputLoss, jacobian: Jacobian, place: Place) -> Operator:
    """That of the mean of the processes' losses."""
    size, dtype = place.team.size, jacobian.dtype

    def by_rows(product: RowsToRows) -> RowsToRows:
        return lambda rows: place.alone(product(place.own(rows)).to(dtype))

    if not isinstance(loss, ClosedForm) or jacobian.size < jacobian.outputs.numel():
        found = gauss_newton(jacobian, by_rows(loss.hessian_product))
    else:
        transposed = by_rows(loss.factor_transposed_product)
        found = output_gauss_newton(
            jacobian, by_rows(loss.factor_product), lambda rows: place.team.all_reduce(transposed(rows).contiguous())
        )
    return replace(found, multiply=lambda vector: found.multiply(vector) / size)
