"""Initial values of LoRA pairs.

Shape letters:  M outputs, N inputs of a layer   R rank of a pair
"""

import math
import re
import zlib
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.methods.lora.pairs import Place, Recipe, factors

INITS = ("default", "pissa", "pissa_niter_N", "olora", "orthogonal", "eva", "corda")
# That take their product out of the weight, so that both together are what it was.
OUT_OF_THE_WEIGHT = ("pissa", "olora", "corda")
# Those that one backend has alone.
ALONE = {"eva": "parametrize", "corda": "peft"}

Pair = tuple[Float[Tensor, "R N"], Float[Tensor, "M R"]]


def refuse_init(init: str, ranks: Sequence[int], backend: str) -> None:
    """Refuse an unknown or unsuitable initialisation.

    Raises:
        ValueError: It is unknown, or needs another rank or the other backend.
    """
    if ALONE.get(init, backend) != backend:
        raise ValueError(f"init={init!r} works only with backend={ALONE[init]!r}")
    if init not in INITS and not re.fullmatch(r"pissa_niter_\d+", init):
        raise ValueError(f"init={init!r} must be one of {', '.join(INITS)}")
    odd = [rank for rank in ranks if rank % 2]
    if init == "orthogonal" and odd:
        raise ValueError(f"init='orthogonal' needs an even rank, and r={odd[0]} is odd")


def takes_from_weight(init: str) -> bool:
    """Whether the product of the factors is subtracted from the weight at the start."""
    return init.startswith(OUT_OF_THE_WEIGHT)


def draws(seed: int, name: str, number: int = 0) -> torch.Generator:
    """A generator for the pairs of a weight, the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {number} {name}".encode()))


@torch.no_grad()
def initialise(place: Place, init: str, generator: torch.Generator) -> None:
    """Initialise the factors of a weight, and subtract their product from it if the initialisation does so."""
    recipe = place.recipe
    matrices = place.matrix().split([rows for _, rows in recipe.parts])
    for (a, b), matrix in zip(factors(place.holder).values(), matrices, strict=True):
        first, second = _pair(init, matrix, recipe, generator)
        a.copy_(first.reshape(a.shape))
        b.copy_(second)
    if takes_from_weight(init):
        place.add(-1)
    if init == "eva":
        place.layer.lora_waits = True  # type: ignore[assignment]


def _pair(init: str, matrix: Float[Tensor, "M N"], recipe: Recipe, generator: torch.Generator) -> Pair:
    """Both factors for a matrix."""
    rank, scaling = recipe.rank, recipe.scaling
    if init == "olora":
        basis, triangle = torch.linalg.qr(matrix)
        return triangle[:rank], basis[:, :rank]
    if init == "orthogonal":
        return _orthogonal(matrix, rank, generator)
    if init.startswith("pissa"):
        number = re.search(r"\d+$", init)
        if number is None:
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        else:
            u, s, vt = _randomised_svd(matrix, rank, int(number[0]), generator)
        root = (s[:rank] / scaling).sqrt()
        return root[:, None] * vt[:rank], u[:, :rank] * root
    rows, columns = matrix.shape
    if recipe.kind == "embedding":  # the other way round, as in peft: what is looked up is zero
        return matrix.new_zeros(rank, columns), torch.randn(rows, rank, generator=generator).to(matrix)
    uniform = torch.rand(rank, columns, generator=generator, dtype=torch.float64)
    return ((2 * uniform - 1) / math.sqrt(columns)).to(matrix), matrix.new_zeros(rows, rank)


def _orthogonal(matrix: Float[Tensor, "M N"], rank: int, generator: torch.Generator) -> Pair:
    """Factors of whose directions between them none is shared, so that their product is zero."""
    rows, columns = matrix.shape
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(draw(rank, rank))
    first, second = draw(columns, rank // 2) @ basis[0::2] / 10, draw(rows, rank // 2) @ basis[1::2] / 10
    return first.mT.to(matrix), second.to(matrix)


def _randomised_svd(
    matrix: Float[Tensor, "M N"], rank: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch.svd_lowrank`, from a generator."""
    start = torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(iterations):
        other, _ = torch.linalg.qr(matrix.mT @ basis)
        basis, _ = torch.linalg.qr(matrix @ other)
    u, s, vt = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ u, s, vt
