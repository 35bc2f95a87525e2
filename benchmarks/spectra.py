"""Spectra of weights: ours against a loop of `torch.linalg.svdvals` and against WeightWatcher, on one thread, in one
run.

python -m benchmarks.spectra [--repeats 7] [--without-large]
"""

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.maths.spectra.sketch import estimate
from lightning_lowrank.maths.spectra.spectrum import Needs, Spectrum, svd
from lightning_lowrank.statistics import find

RANKS = (
    "energy_rank",
    "stable_rank",
    "effective_rank",
    "effective_rank_energy",
    "participation_ratio",
    "nuclear_to_spectral",
)
Job = Callable[[], object]


def transformer(layers: int = 6, width: int = 256) -> list[Tensor]:
    """The weights of a transformer: q, k, v and out, and the two of the MLP, with the power-law rows that training
    gives them.
    """
    draw = torch.Generator().manual_seed(0)
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return [
        torch.randn(*shape, generator=draw) * torch.arange(1, shape[0] + 1)[:, None] ** -0.3
        for _ in range(layers)
        for shape in shapes
    ]


def times(jobs: dict[str, Job], repeats: int) -> dict[str, float]:
    """Median seconds of each job, the jobs in turn so that a slow moment of the machine hits them all."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            taken[name].append(time.perf_counter() - begin)
    return {name: median(seconds) for name, seconds in taken.items()}


def loop(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The reference."""
    return [torch.linalg.svdvals(matrix) for matrix in matrices]


def grams(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The products alone: what no path through them can beat."""
    short = (m.to(dtype) if m.shape[0] <= m.shape[1] else m.mT.to(dtype) for m in matrices)
    return [m @ m.mT for m in short]


def ranks(matrices: Sequence[Tensor], names: Sequence[str], needs: Needs) -> Tensor:
    """Statistics of matrices of one short side by `decompose`, one row each, as a monitor takes them: of all spectra at
    once.
    """
    spectra = decompose(matrices, needs).spectra
    joined = replace(
        spectra[0], values=torch.stack([s.values for s in spectra]), weights=torch.stack([s.weights for s in spectra])
    )
    return torch.stack([find(name)(joined) for name in names], -1)


def worst(found: Tensor, matrices: Sequence[Tensor], names: Sequence[str]) -> float:
    """Largest relative error of statistics against singular values of the matrices in float64."""
    errors = []
    for row, matrix in zip(found, matrices, strict=True):
        values = torch.linalg.svdvals(matrix.double())
        whole = Spectrum(values, torch.ones_like(values), (matrix.shape[0], matrix.shape[1]))
        errors.append((row / torch.stack([find(name)(whole) for name in names]) - 1).abs().max())
    return float(torch.stack(errors).max())


class Model(nn.Module):
    """The matrices as layers, for WeightWatcher."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(m.shape[1], m.shape[0], bias=False) for m in matrices)
        for layer, matrix in zip(self.layers, matrices, strict=True):
            layer.weight = nn.Parameter(matrix.clone())


def weightwatcher(matrices: Sequence[Tensor]) -> Job | None:
    """Its analysis of the same weights, None where it is not installed."""
    try:
        watcher = importlib.import_module("weightwatcher").WeightWatcher(model=Model(matrices))
    except ImportError:
        return None

    def analyze() -> object:
        return watcher.analyze()

    return analyze


def model_rows(repeats: int) -> list[tuple[str, ...]]:
    """All that concerns the whole model."""
    matrices = transformer()
    with_tail = (*RANKS, "tail_exponent", "tail_exponent_fit")
    peer = weightwatcher(matrices)
    jobs: dict[str, Job] = {
        "svdvals": lambda: loop(matrices),
        "products, float32": lambda: grams(matrices, torch.float32),
        "products, float64": lambda: grams(matrices, torch.float64),
        "all spectra": lambda: decompose(matrices, "values"),
        "svd": lambda: [svd(matrix) for matrix in matrices],
        "participation ratio": lambda: ranks(matrices, ("participation_ratio",), "moments"),
        "and stable rank": lambda: ranks(matrices, ("participation_ratio", "stable_rank"), "top"),
        "ranks and tail exponent": lambda: ranks(matrices, with_tail, "values"),
    }
    taken = times(jobs, repeats)
    exact = worst(ranks(matrices, RANKS, "values"), matrices, RANKS)
    moments = worst(ranks(matrices, ("participation_ratio",), "moments"), matrices, ("participation_ratio",))
    top = worst(ranks(matrices, ("stable_rank",), "top"), matrices, ("stable_rank",))
    rows = [
        row(
            "6-layer, 256-wide transformer: all spectra",
            taken["all spectra"],
            "svdvals",
            taken["svdvals"],
            1.4,
            f"{exact:.0e}",
        ),
        row("the same", taken["all spectra"], "svd: whole products", taken["svd"], None, ""),
        row("the same", taken["all spectra"], "float64 products alone", taken["products, float64"], None, ""),
        row(
            "participation ratio alone", taken["participation ratio"], "svdvals", taken["svdvals"], 8, f"{moments:.0e}"
        ),
        row("with stable rank", taken["and stable rank"], "svdvals", taken["svdvals"], 3.5, f"{top:.0e}"),
        row("Gram products alone, float32", taken["products, float32"], "svdvals", taken["svdvals"], None, ""),
        row("Gram products alone, float64", taken["products, float64"], "svdvals", taken["svdvals"], None, ""),
    ]
    own = taken["ranks and tail exponent"]
    if peer is None:
        return [*rows, ("ranks and tail exponent", f"{own:.4f}", "weightwatcher.analyze", "not installed", "", "3", "")]
    return [
        *rows,
        row("ranks and tail exponent", own, "weightwatcher.analyze", times({"peer": peer}, 3)["peer"], 3, ""),
    ]


def wide_rows(repeats: int) -> list[tuple[str, ...]]:
    """Matrices with one long side."""
    matrices = [torch.randn(256, 4096, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    jobs: dict[str, Job] = {
        "ours": lambda: decompose(matrices, "values"),
        "svdvals": lambda: loop(matrices),
        "svd": lambda: [svd(matrix) for matrix in matrices],
    }
    taken = times(jobs, repeats)
    error = worst(ranks(matrices, RANKS, "values"), matrices, RANKS)
    return [
        row("256 x 4096: all spectra", taken["ours"], "svdvals", taken["svdvals"], 8, f"{error:.0e}"),
        row("the same", taken["ours"], "svd: whole products", taken["svd"], None, ""),
    ]


def large_rows(repeats: int) -> list[tuple[str, ...]]:
    """A matrix that is sketched: errors in parts of those reported."""
    matrix = (
        torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 4097)[:, None] ** -0.5
    )

    def sketched() -> Spectrum:
        return decompose([matrix], "values").spectra[0]

    taken = times({"sketch": sketched, "svdvals": lambda: torch.linalg.svdvals(matrix)}, repeats)
    truth, parts, widths = svd(matrix), [], []
    for name in RANKS:
        value, error = estimate(find(name), sketched())
        parts.append(float((value - find(name)(truth)).abs() / error))
        widths.append(float(error / value))
    error_cell = f"{max(parts):.2f} of the reported, which is up to {max(widths):.0%}"
    return [row("4096 x 4096: sketch", taken["sketch"], "svdvals", taken["svdvals"], 6, error_cell)]


def row(what: str, ours: float, peer: str, theirs: float, asked: float | None, error: str) -> tuple[str, ...]:
    """One line of the table."""
    return (
        what,
        f"{ours:.4f}",
        peer,
        f"{theirs:.4f}",
        f"{theirs / ours:.1f}",
        "" if asked is None else f"{asked:g}",
        error,
    )


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--without-large", action="store_true")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    table = Table(
        "what",
        "seconds",
        "peer",
        "seconds",
        "times faster",
        "asked",
        "worst error",
        title="Spectra, one thread",
    )
    for cells in (
        *model_rows(chosen.repeats),
        *wide_rows(chosen.repeats),
        *(() if chosen.without_large else large_rows(3)),
    ):
        table.add_row(*cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
