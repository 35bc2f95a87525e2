"""Oracle: numpy's SVD of the whole product of each head."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_lowrank import svd
from lightning_lowrank.maths.attention_circuits import circuit_updates


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def dense(parts: list[Any], head: int, of_keys: int) -> tuple[Any, Any]:
    q, k, dq, dk = (part.double().numpy() for part in parts)
    return dq[head].T @ k[of_keys] + q[head].T @ dk[of_keys], dq[head].T @ dk[of_keys]


@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "inputs", "others"),
    [(3, 3, 4, 20, 20), (4, 2, 4, 20, 20), (4, 1, 4, 20, 9), (2, 2, 8, 10, 10), (2, 2, 8, 5, 6)],
)
def test_singular_values_are_those_of_the_whole_product(
    heads: int, key_heads: int, width: int, inputs: int, others: int
) -> None:
    parts = drawn(*[(heads, width, inputs), (key_heads, width, others)] * 2)
    parts[2], parts[3] = 1e-4 * parts[2], 1e-5 * parts[3]
    found = circuit_updates(*parts)

    for head in range(heads):
        for small, whole in zip(found, dense(parts, head, head // (heads // key_heads)), strict=True):
            expected = np.linalg.svd(whole, compute_uv=False)
            values = np.zeros_like(expected)
            own = np.linalg.svd(small[head].numpy(), compute_uv=False)
            values[: len(own)] = own[: len(values)]
            np.testing.assert_allclose(values, expected, atol=1e-13 * expected[0])


def test_both_together_are_the_change_of_the_product() -> None:
    parts = drawn(*[(2, 4, 12), (2, 4, 12)] * 2)
    q, k, dq, dk = (part.numpy() for part in parts)

    for head in range(2):
        change = (q[head] + dq[head]).T @ (k[head] + dk[head]) - q[head].T @ k[head]
        np.testing.assert_allclose(sum(dense(parts, head, head)), change, atol=1e-12)


def test_batches_of_layers_are_what_each_layer_is() -> None:
    parts = drawn(*[(3, 4, 5, 16), (3, 2, 5, 16)] * 2, dtype=torch.float32)
    together = circuit_updates(*parts)
    alone = [circuit_updates(*(part[i] for part in parts)) for i in range(3)]

    for i in range(3):
        for mine, own in zip(together, alone[i], strict=True):
            torch.testing.assert_close(svd(mine[i]).values, svd(own).values)
