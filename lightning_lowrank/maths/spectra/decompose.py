"""Spectra of many matrices at once, each with as much work as is needed.

Shape letters:  B any batch axes   M rows, N columns of a matrix   S short side of a group of matrices   G matrices in
the group
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import prod
from operator import itemgetter

import torch
from torch import Tensor

from lightning_lowrank.maths.spectra.sketch import moments_of_gram, sketch, top_of_gram
from lightning_lowrank.maths.spectra.spectrum import (
    Needs,
    Spectrum,
    eigenvalues_of_grams,
    full_precision,
    short_grams,
    svd,
    working_dtype,
)

# Longest short side that is solved exactly.
SKETCH_ABOVE = 1500
# Bytes of Gram matrices in one call.
WORKSPACE = 2**28
# Of the Gram matrix of its trial space, whole and in part, and of two quadratures each for the estimate and the coarse
# one.
SOLVES_OF_A_SKETCH = 6


@dataclass(frozen=True)
class Decomposition:
    """Spectra in the order of the matrices.

    Attributes:
        spectra: Each with the batch axes and the shape of its matrix.
        num_solves: Calls of an eigensolver that it took; on CUDA each waits for the device.
    """

    spectra: list[Spectrum]
    num_solves: int


def decompose(
    matrices: Sequence[Tensor],
    needs: Needs,
    *,
    generator: torch.Generator | None = None,
    sketch_above: int = SKETCH_ABOVE,
) -> Decomposition:
    """Spectra of matrices of any shapes, dtypes and devices. Matrices with the same short side share solver calls.

    Args:
        matrices: `[*B, M, N]` each. A matrix that cannot be decomposed gives NaN and does not affect the others.
        needs: "moments" and "top" need no eigensolver, except for sketched matrices.
        generator: The seeds of sketches are derived from its seed (default 0), so a sketch does not depend on what else
            is decomposed.
        sketch_above: Matrices with a longer short side are sketched.

    Examples:
        >>> solved = decompose([torch.eye(3), torch.ones(2, 3, 5)], "values")
        >>> [tuple(spectrum.values.shape) for spectrum in solved.spectra], solved.num_solves
        ([(3,), (2, 3)], 1)
    """
    spectra: dict[int, Spectrum] = {}
    num_solves = 0
    for members in _batches(matrices, sketch_above):
        batch = [matrices[i] for i in members]
        found, solves = _attempt(batch, needs, generator, sketch_above)
        spectra |= zip(members, found, strict=True)
        num_solves += solves
    return Decomposition([spectra[i] for i in range(len(matrices))], num_solves)


def flops(shape: Sequence[int]) -> float:
    """Work of decomposing matrices `[*B, M, N]`, roughly: Gram products and tridiagonalisation, or products with a
    block of probes.
    """
    short, long = sorted(shape[-2:])
    batch = prod(shape[:-2])
    return batch * (
        2.0 * short * long * (short + 1.0) + 4 / 3 * short**3 if short <= SKETCH_ABOVE else 800.0 * short * long
    )


def _batches(matrices: Sequence[Tensor], sketch_above: int) -> Iterator[list[int]]:
    """Numbers of matrices that are solved together."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        short = min(matrix.shape[-2:])
        alone = short == 0 or short > sketch_above or matrix.is_complex() or matrix.layout != torch.strided
        alike[i if alone else (matrix.device, short)].append(i)
    for members in alike.values():
        bytes_each = [8 * matrices[i].shape[:-2].numel() * min(matrices[i].shape[-2:]) ** 2 for i in members]
        starts = [before // WORKSPACE for before in accumulate(bytes_each, initial=0)]
        for _, batch in groupby(zip(starts, members, strict=False), key=itemgetter(0)):
            yield [i for _, i in batch]


def _attempt(
    batch: Sequence[Tensor], needs: Needs, generator: torch.Generator | None, sketch_above: int
) -> tuple[list[Spectrum], int]:
    """Spectra, and how many calls of a solver they took; where all at once fails, one matrix after the other."""
    with suppress(RuntimeError, TypeError, ValueError):
        return _together(batch, needs, generator, sketch_above)
    # Not while the error is handled: it holds the memory that did not suffice.
    first = batch[0]
    parts = (
        batch
        if len(batch) > 1
        else list(first.reshape(-1, *first.shape[-2:]))
        if _divisible(first, sketch_above)
        else []
    )
    if not parts:
        return [_lost(first)], 0
    alone = [_attempt([matrix], needs, generator, sketch_above) for matrix in parts]
    spectra, num_solves = [found for spectra, _ in alone for found in spectra], sum(solves for _, solves in alone)
    return (spectra if len(batch) > 1 else [_stacked(spectra, first)]), num_solves


def _together(
    batch: Sequence[Tensor], needs: Needs, generator: torch.Generator | None, sketch_above: int
) -> tuple[list[Spectrum], int]:
    first = batch[0]
    with full_precision(first.device):
        if len(batch) == 1 and min(first.shape[-2:]) > sketch_above and not first.is_complex():
            return [sketch(first, generator=_on(first.device, generator))], SOLVES_OF_A_SKETCH
        if len(batch) == 1 and (first.is_complex() or 0 in first.shape[-2:]):
            return [svd(first)], 1
        return _solved(batch, needs), int(needs == "values")


def _divisible(matrices: Tensor, sketch_above: int) -> bool:
    """Whether it is several matrices; the sketch of a lost one would have no probes to be put beside the others'."""
    return matrices.ndim > 2 and matrices.layout == torch.strided and min(matrices.shape[-2:]) <= sketch_above


def _stacked(spectra: Sequence[Spectrum], matrices: Tensor) -> Spectrum:
    """Spectra of single matrices as one, with their batch axes; NaN as long as the others for one that was lost."""
    size = min(s.values.shape[-1] for s in spectra)
    values, weights = (torch.stack([getattr(s, field)[:size] for s in spectra]) for field in ("values", "weights"))
    whole = all(s.whole for s in spectra)
    batch = matrices.shape[:-2]
    return Spectrum(
        values.reshape(*batch, -1), weights.reshape(*batch, -1), (matrices.shape[-2], matrices.shape[-1]), whole=whole
    )


def _solved(batch: Sequence[Tensor], needs: Needs) -> list[Spectrum]:
    """Spectra of matrices of one short side from one buffer of Gram matrices."""
    exact = needs == "values"
    gram, scale = short_grams(batch, working_dtype(batch[0].device) if exact else torch.float32, upper=exact)
    if exact:
        energies = eigenvalues_of_grams(gram).flip(-1).clamp_(min=0)
        weights = torch.ones_like(energies)
    else:
        energies, weights = (moments_of_gram if needs == "moments" else top_of_gram)(gram)
    values = energies.sqrt()
    if scale is not None:
        values = values * scale[:, None].to(values)
    sizes = [matrix.shape[:-2].numel() for matrix in batch]
    return [
        Spectrum(v.reshape(*m.shape[:-2], -1), w.reshape(*m.shape[:-2], -1), (m.shape[-2], m.shape[-1]), whole=exact)
        for m, v, w in zip(batch, values.split(sizes), weights.split(sizes), strict=True)
    ]


def _lost(matrix: Tensor) -> Spectrum:
    """What stands for a matrix that could not be decomposed."""
    shape = (matrix.shape[-2], matrix.shape[-1])
    kept = (*matrix.shape[:-2], max(1, min(shape)))
    values = torch.full(kept, torch.nan, dtype=working_dtype(matrix.device), device=matrix.device)
    return Spectrum(values, torch.ones_like(values), shape)


def _on(device: torch.device, generator: torch.Generator | None) -> torch.Generator:
    """A generator of that device, the same for each matrix, whose seed is mixed.

    Weights drawn with seed 0 and sketched with seed 0 would meet their own entries as probes.
    """
    seed = 0 if generator is None else generator.initial_seed()
    # Fibonacci hashing; the generator of the CPU reads the lower 32 bits of a seed only.
    # Tensors without entries are drawn by the CPU's.
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(
        (seed * 0x9E3779B97F4A7C15 + 0x5EED5EED5EED5EED) % 2**64 >> 32
    )
