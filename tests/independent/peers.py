"""Other tools on the same model, weights and batch, where they are installed: PyHessian and curvlinops."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.independent.trainings import Run


@dataclass(frozen=True)
class Peer:
    """One number of another tool beside what the event file has.

    Attributes:
        error: Reported beside the logged number.
    """

    quantity: str
    tool: str
    theirs: float
    logged: float
    error: float


def peers(run: Run) -> list[Peer]:
    """Of the first sample; nothing of tools that are not installed."""
    step = run.steps[0]
    net = run.at(step.before).net
    found = []
    for tool, numbers in TOOLS.items():
        try:
            values = dict(numbers(net, *step.batch))
        except ImportError:
            continue
        for name, value in values.items():
            logged, error = (run.logged[f"curvature/{name}{end}"][0] for end in ("", "_error"))
            found.append(Peer(name, tool, float(value), logged, error))
    return found


def _pyhessian(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[str, float]]:
    from pyhessian import hessian

    values, _ = hessian(net, nn.CrossEntropyLoss(), data=(x, y), cuda=False).eigenvalues(maxIter=500, tol=1e-7)
    yield "hessian_lambda_max", values[0]


def _curvlinops(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[str, float]]:
    from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator

    operators = {
        "hessian": HessianLinearOperator,
        "gauss_newton": GGNLinearOperator,
        "empirical_fisher": EFLinearOperator,
    }
    for name, operator in operators.items():
        products = operator(net, nn.CrossEntropyLoss(), list(net.parameters()), [(x, y)])
        yield from _sums(name, (products @ torch.eye(products.shape[1])).double().numpy())


def _sums(name: str, matrix: np.ndarray) -> Iterator[tuple[str, float]]:
    matrix = (matrix + matrix.T) / 2
    yield f"{name}_lambda_max", float(np.linalg.eigvalsh(matrix)[-1])
    yield f"{name}_trace", float(np.trace(matrix))
    yield f"{name}_squared_norm", float((matrix**2).sum())


TOOLS: dict[str, Callable[..., Any]] = {
    "PyHessian": _pyhessian,
    "curvlinops": _curvlinops,
}
