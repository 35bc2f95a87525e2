"""Second derivatives of a loss as operators: products with vectors on a graph that is kept, never a matrix.

All by double backward. Compositions of forward and reverse mode that go through `jacrev` are wrong through
normalisation layers, and forward mode is not there for fused attention.

Shape letters:  P entries of all parameters   L parameters   R rows of the model's outputs   C columns of them   n size
of an operator
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import working_dtype

RowsToRows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operator:
    """A symmetric matrix that is only ever multiplied with.

    Attributes:
        size: Rows and columns.
        multiply: Its product with one vector of `dtype` on `device`.
    """

    size: int
    multiply: Callable[[Tensor], Tensor]
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """Where each parameter is in a vector of all parameters.

    Attributes:
        names: Of the parameters, in order.
        shapes: Theirs.
        dtype: Of the vectors: wide enough for every parameter, and at least float32.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> "Layout":
        """The layout of named parameters."""
        return cls(tuple(named), tuple(tuple(p.shape) for p in named.values()), _dtype(list(named.values())))

    @cached_property
    def sizes(self) -> list[int]:
        """Entries of each parameter."""
        return [prod(shape) for shape in self.shapes]

    def flatten(self, tensors: Sequence[Tensor]) -> Float[Tensor, " P"]:
        """One vector of a tensor per parameter."""
        return _flat(tensors, self.dtype)

    def split(self, vector: Float[Tensor, " P"]) -> list[Tensor]:
        """A view of a vector per parameter, in its shape."""
        return [part.view(shape) for part, shape in zip(vector.split(self.sizes), self.shapes, strict=True)]

    def sums(self, entries: Float[Tensor, "*B P"]) -> Float[Tensor, "*B L"]:
        """Sum over the entries of each parameter."""
        return torch.stack([part.sum(-1) for part in entries.split(self.sizes, -1)], -1)

    def energies(self, entries: Float[Tensor, "*B P"]) -> Float[Tensor, "*B L"]:
        """Squared length of the entries of each parameter, in double precision: squares of large losses need it."""
        wide = working_dtype(entries.device)
        parts = entries.split(self.sizes, -1)
        return torch.stack([torch.linalg.vector_norm(part, dim=-1, dtype=wide).square() for part in parts], -1)


def hessian(loss: Float[Tensor, ""], params: Sequence[Tensor]) -> tuple[Float[Tensor, " P"], Operator]:
    """The gradient of a loss, and its Hessian.

    A product is one backward pass through the graph of the gradient, which lives as long as the operator: about three
    times the memory of the forward pass. Parameters that the loss does not depend on have zeros.
    """
    gradient = _slopes(loss, params)
    return _hessian_of(gradient, params, lambda vector: _products(gradient, params, _parts(vector, params)))


def hessian_and_jacobian(
    loss: Float[Tensor, ""],
    params: Sequence[Tensor],
    given: Float[Tensor, "..."],
    as_rows: Callable[[Tensor], Float[Tensor, "R C"]],
) -> tuple[Float[Tensor, " P"], Operator, "Jacobian"]:
    """The same, and the derivative of outputs that the loss was computed from, on the same graph.

    A product with the Hessian contains the change of the outputs along its vector, which the Jacobian is told.

    Args:
        given: The outputs as the loss took them.
        as_rows: Makes rows of a tensor of their shape.
    """
    *gradient, slope = _slopes(loss, [*params, given])
    with torch.enable_grad():
        outputs = as_rows(given)
    if not slope.requires_grad:  # the loss is linear in the outputs
        return *hessian(loss, params), Jacobian(outputs, params)
    # The gradient is the product of the transpose with the slope, plus what does not depend on the slope.
    jacobian = Jacobian(outputs, params, adjoint=(slope, gradient), as_rows=as_rows)

    def products(vector: Tensor) -> Sequence[Tensor]:
        *found, change = _products(gradient, [*params, slope], _parts(vector, params))
        jacobian.know(vector, as_rows(change))
        return found

    return *_hessian_of(gradient, params, products), jacobian


@dataclass(frozen=True)
class Jacobian:
    """Derivative of all outputs of a model with respect to all parameters.

    Attributes:
        outputs: Outputs with their graph, which is kept.
        params: Parameters of the derivative.
        all_reduce: Sums over all processes, each of which has its own rows and zeros elsewhere. Every product is then
            that of all rows, the same on every process. It is NaN if one process failed, so that no process waits.
        adjoint: A tensor, and for each parameter the product of the transpose with it, as a function of it. Linear up
            to a constant, so that the derivative is the Jacobian. Made for the first product unless given.
        as_rows: Makes rows of outputs of a tensor of that shape.
    """

    outputs: Float[Tensor, "R C"]
    params: Sequence[Tensor]
    all_reduce: Callable[[Tensor], Tensor] | None = None
    adjoint: tuple[Tensor, Sequence[Tensor]] | None = None
    as_rows: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors on both sides."""
        return _dtype(self.params)

    @cached_property
    def size(self) -> int:
        """Entries of all parameters."""
        return sum(p.numel() for p in self.params)

    @cached_property
    def _adjoint(self) -> tuple[Tensor, Sequence[Tensor]]:
        """The one that is given, or one of zeros."""
        if self.adjoint is not None:
            return self.adjoint
        at = torch.zeros_like(self.outputs, requires_grad=True)
        keep = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        return at, torch.autograd.grad(self.outputs, self.params, at, **keep)

    @cached_property
    def _last(self) -> list[tuple[Tensor, Tensor]]:
        """The vector that was multiplied last, and its product."""
        return []

    def know(self, vector: Float[Tensor, " P"], change: Float[Tensor, "R C"]) -> None:
        """Keep the change of the outputs along a direction until that along another is known."""
        self._last[:] = [(vector, change.to(self.dtype))]

    def forward(self, vector: Float[Tensor, " P"]) -> Float[Tensor, "R C"]:
        """Change of the outputs along a direction in parameter space; computed once for operators that are multiplied
        with the same vector one after the other.
        """
        if not any(known is vector for known, _ in self._last):
            self.know(vector, self._everywhere(lambda: self._change(vector), self.outputs.shape))
        return self._last[0][1]

    def backward(self, rows: Float[Tensor, "R C"]) -> Float[Tensor, " P"]:
        """Product of the transpose with a vector in output space."""
        return self._everywhere(
            lambda: _flat(_products([self.outputs], self.params, [rows]), self.dtype), torch.Size([self.size])
        )

    def _change(self, vector: Float[Tensor, " P"]) -> Float[Tensor, "R C"]:
        at, image = self._adjoint
        (change,) = _products(image, [at], _parts(vector, self.params))
        return (change if self.as_rows is None else self.as_rows(change)).to(self.dtype)

    def _everywhere(self, make: Callable[[], Tensor], shape: torch.Size) -> Tensor:
        if self.all_reduce is None:
            return make()
        try:
            product = make().contiguous()
        except Exception:  # the others would wait for this process
            product = torch.full(shape, torch.nan, dtype=self.dtype, device=self.outputs.device)
        return self.all_reduce(product)


def gauss_newton(jacobian: Jacobian, product: RowsToRows) -> Operator:
    """Gauss-Newton matrix J^T H J: the Hessian of the loss if the outputs were linear in the parameters.

    Args:
        product: With H, the Hessian of the loss in the outputs.
    """
    return _in_parameters(jacobian, lambda vector: jacobian.backward(product(jacobian.forward(vector))))


def output_gauss_newton(jacobian: Jacobian, factor: RowsToRows, factor_transposed: RowsToRows) -> Operator:
    """L^T J J^T L, of the size of the outputs: its eigenvalues are those of the Gauss-Newton matrix, up to zeros.

    Args:
        factor: Product with L, where L L^T is the Hessian of the loss in the outputs.
        factor_transposed: Product with L^T.
    """
    shape = jacobian.outputs.shape

    def multiply(vector: Tensor) -> Tensor:
        return factor_transposed(jacobian.forward(jacobian.backward(factor(vector.view(shape))))).reshape(-1)

    return Operator(shape.numel(), multiply, jacobian.outputs.device, jacobian.dtype)


def fisher(jacobian: Jacobian, gradients: Float[Tensor, "R C"]) -> Operator:
    """Mean over rows of the outer product of the gradient of the row's loss with itself.

    The empirical Fisher with the gradients at the targets; the Monte Carlo estimate of the Fisher, without bias, with
    those at targets drawn from the model.

    Args:
        gradients: Of each row's own loss by its outputs, not divided by the number of rows.
    """

    def multiply(vector: Tensor) -> Tensor:
        slopes = (gradients * jacobian.forward(vector)).sum(-1, keepdim=True)
        return jacobian.backward(gradients * (slopes / len(gradients)))

    return _in_parameters(jacobian, multiply)


def preconditioned(operator: Operator, diagonal: Float[Tensor, " n"]) -> Operator:
    """D^(1/2) A D^(1/2): symmetric, with the eigenvalues of D A.

    Args:
        diagonal: Of D; nowhere negative.
    """
    root = diagonal.sqrt()
    return _with(operator, lambda vector: root * operator.multiply(root * vector))


def dense(operator: Operator) -> Float[Tensor, "n n"]:
    """The matrix, its symmetric part, by as many products as it has rows."""
    unit = torch.eye(operator.size, device=operator.device, dtype=operator.dtype)
    matrix = torch.stack([operator.multiply(row) for row in unit])
    return (matrix + matrix.mT) / 2


def _in_parameters(jacobian: Jacobian, multiply: Callable[[Tensor], Tensor]) -> Operator:
    return Operator(jacobian.size, multiply, jacobian.outputs.device, jacobian.dtype)


def _slopes(loss: Float[Tensor, ""], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Derivatives of a loss, with their graph."""
    return torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)


def _hessian_of(
    gradient: Sequence[Tensor], params: Sequence[Tensor], products: Callable[[Tensor], Sequence[Tensor]]
) -> tuple[Float[Tensor, " P"], Operator]:
    dtype = _dtype(params)
    flat = _flat([g.detach() for g in gradient], dtype)
    return flat, Operator(len(flat), lambda vector: _flat(products(vector), dtype), flat.device, dtype)


def _with(operator: Operator, multiply: Callable[[Tensor], Tensor]) -> Operator:
    return Operator(operator.size, multiply, operator.device, operator.dtype)


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, " P"]:
    return torch.cat([(tensor.to_dense() if tensor.is_sparse else tensor).reshape(-1).to(dtype) for tensor in tensors])


def _parts(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _products(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Vectors times the derivative of outputs by inputs; the graph is kept. 0 for outputs that depend on nothing."""
    pairs = [
        (output, vector.to(output.dtype))
        for output, vector in zip(outputs, vectors, strict=True)
        if output.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    differentiated, along = zip(*pairs, strict=True)
    # Never with `create_graph`: the graph of a product would cost as much memory again.
    return torch.autograd.grad(
        differentiated, inputs, along, retain_graph=True, allow_unused=True, materialize_grads=True
    )
