"""Effect of an update of queries and keys on what a head compares: `x' Wq' Wk x`.

Shape letters:  B any batch axes   H heads of queries   G heads of keys, a divisor of H   D columns that a head compares
N, M inputs of queries and of keys   R at most 2 D
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import working_dtype


def circuit_updates(
    queries: Float[Tensor, "*B H D N"],
    keys: Float[Tensor, "*B G D M"],
    of_queries: Float[Tensor, "*B H D N"],
    of_keys: Float[Tensor, "*B G D M"],
) -> tuple[Float[Tensor, "*B H R S"], Float[Tensor, "*B H P T"]]:
    """Small matrices with the singular values of `dWq' Wk + Wq' dWk` and of `dWq' dWk`, for each head.

    Together these two are the change of `Wq' Wk`, exactly. Only the triangles of thin QR factorisations of `[dWq' Wq']`
    and `[dWk' Wk']` count, for `(QA RA)(QB RB)'` has the singular values of `RA RB'`. Work: `8 D^2 (N + M)` per head,
    where that of the whole matrix is cubic in N.

    Args:
        queries: Before the step.
        keys: Before the step; each of their heads is compared with `H / G` heads of queries that follow each other.
        of_queries: What the step adds.
        of_keys: The same.

    Returns:
        The first-order and the second-order update, at most `2 D` and at most `D` a side.
    """
    width, repeats = queries.shape[-2], queries.shape[-3] // keys.shape[-3]
    first = _triangles(of_queries, queries)
    second = _triangles(of_keys, keys).repeat_interleave(repeats, -3)
    swapped = torch.cat([second[..., width:], second[..., :width]], -1)
    return first @ swapped.mT, first[..., :width, :width] @ second[..., :width, :width].mT


def _triangles(left: Float[Tensor, "*B H D N"], right: Float[Tensor, "*B H D N"]) -> Float[Tensor, "*B H R C"]:
    """Of thin QR factorisations of `[left' right']`."""
    tall = torch.cat([left, right], -2).to(working_dtype(left.device)).mT
    triangles: Tensor = torch.linalg.qr(tall, mode="r")[1]
    return triangles
