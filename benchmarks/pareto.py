"""Errors against products: what each way of spending them gives, where the truth is known.

    python -m benchmarks.pareto

The Hessian is that of a digits MLP of 1,810 parameters after 200 steps, dense. The class-summed kernel is that of 150
examples and 4 outputs, after 100 steps. Errors are relative, rms over seeds.
"""

from collections.abc import Callable

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.coverage import Example, kernel_of, of_spectrum, operator
from benchmarks.curvature import trained_digits
from lightning_lowrank.maths.operators import traces
from lightning_lowrank.maths.operators.eigenspaces import Eigenpairs, top_eigenpairs, widened
from lightning_lowrank.maths.operators.operators import Operator
from lightning_lowrank.monitors.tangent_kernel import estimates
from lightning_lowrank.monitors.tangent_kernel.kernels import known_part, projections, sketched_kernel
from lightning_lowrank.statistics.registry import find

TOP, PROBES, MODES = 5, 5, 7
RANK = find("effective_rank_energy")
# Of a number of products and a seed.
Way = Callable[[int, int], Tensor]


def draw(seed: int) -> torch.Generator:
    """The random numbers of a trial."""
    return torch.Generator().manual_seed(seed)


def rms(way: Way, products: int, truth: Tensor, trials: int) -> str:
    """Relative error of the worst entry, over seeds."""
    off = torch.stack([((way(products, seed).double() - truth) / truth).abs().amax() for seed in range(trials)])
    return f"{100 * float(off.square().mean().sqrt()):.2g} %"


def table_of(title: str, budgets: list[int], ways: dict[str, tuple[Way, Tensor]], trials: int) -> Table:
    """A row for each number of products, a column for each way."""
    table = Table(title=title)
    for heading in ("products", *ways):
        table.add_column(heading, justify="right")
    for products in budgets:
        table.add_row(str(products), *(rms(way, products, truth, trials) for way, truth in ways.values()))
    return table


def of_hessian(matrix: Operator, gradient: Tensor, trials: int) -> Table:
    """Its five largest eigenvalues, and its trace."""
    values = torch.linalg.eigvalsh(torch.stack([matrix.multiply(row) for row in torch.eye(matrix.size)]).double())

    def krylov(products: int, seed: int) -> Eigenpairs:
        return top_eigenpairs(matrix, TOP, further=gradient[None], num_products=products, generator=draw(seed))

    def wider(products: int, seed: int) -> Tensor:
        signs = traces.random_signs(matrix, PROBES, draw(100 + seed))
        images = torch.stack([matrix.multiply(row) for row in signs])
        return widened(matrix, krylov(products - 1, seed), images, num_products=1).values

    def trace(known: Eigenpairs | None, probes: int, seed: int) -> Tensor:
        signs = traces.random_signs(matrix, probes, draw(200 + seed))
        found = traces.spectral_estimate(matrix, signs, known=known, steps=1)
        return traces.debiased(traces.trace, found.spectrum).value

    top, total = values.flip(0)[:TOP], values.sum()
    ways: dict[str, tuple[Way, Tensor]] = {
        "five values: Krylov": (lambda products, seed: krylov(products, seed).values, top),
        "one of them in random images": (wider, top),
        "trace: random vectors": (lambda products, seed: trace(None, products, seed), total),
        "five of them, five pairs out": (lambda n, seed: trace(krylov(n - PROBES, seed), PROBES, seed), total),
        "the whole space out": (lambda n, seed: trace(krylov(n - PROBES, seed).space, PROBES, seed), total),
    }
    return table_of(f"Hessian of {matrix.size:,} parameters", [10, 12, 15, 18, 24], ways, trials)


def of_kernel(example: Example, trials: int) -> Table:
    """The effective rank of a class-summed kernel, the same seven products with it known, by pairs of products with the
    Jacobian beyond these.
    """
    matrix = kernel_of(torch.cat(example.jacobians(), -1), "class_summed").detach()
    truth = of_spectrum(torch.linalg.eigvalsh(matrix).clamp(min=0), "ntk")["ntk_effective_rank_energy"]
    kernel, jacobian = operator(matrix), example.outputs("class_summed").jacobian
    columns = jacobian.outputs.shape[1]

    def modes(seed: int) -> Eigenpairs:
        return top_eigenpairs(kernel, 4, num_products=MODES, generator=draw(seed)).space

    def quadrature(pairs: int, seed: int) -> Tensor:
        steps = max(1, pairs // columns // PROBES)
        signs = traces.random_signs(kernel, PROBES, draw(300 + seed))
        found = traces.spectral_estimate(kernel, signs, known=modes(seed), steps=steps)
        return traces.debiased(RANK, found.spectrum).value

    def projected(pairs: int, seed: int) -> Tensor:
        known, drawn = modes(seed), projections(jacobian, num=2 * pairs, seed=seed).detach()
        sketched = sketched_kernel(drawn, "class_summed", known=known_part(kernel, known))
        return estimates.rank(RANK, sketched, known).value

    ways: dict[str, tuple[Way, Tensor]] = {
        "quadrature, five vectors": (quadrature, truth),
        "projections, two a pair": (projected, truth),
    }
    return table_of(f"Effective rank ({float(truth):.1f}) of a class-summed kernel", [8, 40, 80, 120], ways, trials)


def main(trials: int = 12) -> None:
    """Print the tables.

    Args:
        trials: Seeds.
    """
    torch.set_num_threads(1)
    console = Console(width=150)
    console.print(of_hessian(*trained_digits(), trials))
    console.print(of_kernel(Example.of(2), trials))


if __name__ == "__main__":
    auto_cli(main)
