"""Bases: what they capture, against known spectra and dense decompositions."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.methods.galore.bases import Bases, Projection, without_rounding
from lightning_lowrank.methods.galore.matrix import rotate_

RIGHT, LEFT, BOTH = (False, True), (True, False), (True, True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(values: list[float], rows: int = 12, columns: int = 8) -> torch.Tensor:
    draws = torch.randn(2, 12, 12, generator=generator(), dtype=torch.float64)
    left, right = torch.linalg.qr(draws[0, :rows, :rows]).Q, torch.linalg.qr(draws[1, :columns, :columns]).Q
    return left[:, : len(values)] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[:, : len(values)].mT


@pytest.mark.parametrize("kind", ["svd", "subspace"])
@pytest.mark.parametrize("sides", [LEFT, RIGHT, BOTH])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_captured_is_the_share_of_the_largest_singular_values(size: float, sides: tuple[bool, bool], kind: str) -> None:
    matrix, projection = size * planted([4.0, 3.0, 2.0, 1.0]), Projection(2, *sides)

    bases = projection.made(kind, matrix, None, generator)  # type: ignore[arg-type]

    assert bases.captured(matrix).item() == pytest.approx(25 / 30, rel=1e-9)
    assert projection.best(matrix).item() == pytest.approx(25 / 30, rel=1e-9)


@pytest.mark.parametrize("sides", [LEFT, RIGHT, BOTH])
def test_a_matrix_of_that_rank_is_captured_whole_and_comes_back(sides: tuple[bool, bool]) -> None:
    matrix, projection = planted([4.0, 0.5]), Projection(2, *sides)

    bases = projection.made("subspace", matrix, None, generator)

    assert_close(bases.back(bases.project(matrix)), matrix, rtol=0, atol=1e-12)
    assert tuple(bases.project(matrix).shape) == projection.shape((12, 8))


@pytest.mark.parametrize("sides", [LEFT, RIGHT, BOTH])
def test_one_step_from_the_last_basis_is_nearly_the_best(sides: tuple[bool, bool]) -> None:
    projection = Projection(16, *sides)
    draws = torch.randn(4, 96, 96, generator=generator(), dtype=torch.float64)
    left, right, turned, other = torch.linalg.qr(draws).Q
    values = torch.diag(1 / torch.arange(1, 97, dtype=torch.float64))
    before = left @ values @ right.mT
    now = torch.linalg.qr(left + 0.7 * turned).Q @ values @ torch.linalg.qr(right + 0.7 * other).Q.mT
    old = projection.made("svd", before, None, generator)

    new = projection.made("subspace", now, old, generator)

    best = torch.linalg.svdvals(now).square()
    best = best[:16].sum() / best.sum()
    assert old.captured(now) < 0.8 * best
    assert 0.95 * best < new.captured(now) <= best
    for side in new.sides:
        assert_close(side.mT @ side, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_random_basis_captures_its_share_in_the_mean() -> None:
    matrix, projection = planted([4.0, 3.0, 2.0, 1.0]), Projection(2, *RIGHT)

    found = [projection.made("random", matrix, None, lambda i=i: generator(i)).captured(matrix) for i in range(400)]

    shares = torch.stack(found)
    assert shares.mean().item() == pytest.approx(projection.chance((12, 8)), abs=4 * shares.std().item() / 20)
    assert projection.chance((12, 8)) == 2 / 8
    assert Projection(2, *BOTH).chance((12, 8)) == 2 / 8 * 2 / 12


def test_overlap_is_the_mean_squared_cosine() -> None:
    angle, axes = 0.3, torch.eye(6, dtype=torch.float64)
    old = Bases(axes[:, :2], None)
    turned = math.cos(angle) * axes[:, 1] + math.sin(angle) * axes[:, 2]
    new = Bases(torch.stack([axes[:, 0], turned], 1), None)

    assert new.overlap(old).item() == pytest.approx((1 + math.cos(angle) ** 2) / 2)
    assert new.overlap(new).item() == pytest.approx(1)
    assert Projection(2, *LEFT).overlap_by_chance((6, 9)) == 2 / 6
    assert Projection(2, *BOTH).overlap_by_chance((6, 8)) == (2 / 6 + 2 / 8) / 2


def test_random_bases_overlap_as_said() -> None:
    matrix, projection = planted([4.0, 3.0, 2.0, 1.0]), Projection(3, *LEFT)
    bases = [projection.made("random", matrix, None, lambda i=i: generator(i)) for i in range(200)]

    overlaps = torch.stack([one.overlap(other) for one, other in zip(bases[::2], bases[1::2], strict=True)])

    expected = projection.overlap_by_chance((12, 8))
    assert overlaps.mean().item() == pytest.approx(expected, abs=4 * overlaps.std().item() / 10)


def test_a_first_moment_that_turns_within_its_subspace_is_the_same_matrix() -> None:
    matrix = planted([4.0, 3.0, 2.0, 1.0])
    old = Projection(3, *BOTH).made("svd", matrix, None, generator)
    assert old.left is not None and old.right is not None
    turns = torch.linalg.qr(torch.randn(2, 3, 3, generator=generator(1), dtype=torch.float64)).Q
    new = Bases(old.left @ turns[0], old.right @ turns[1])
    moment = torch.randn(3, 3, generator=generator(2), dtype=torch.float64)
    state = {"momentum_buffer": moment.clone()}

    rotate_(state, new.turn(old), {})

    assert_close(new.back(state["momentum_buffer"]), old.back(moment), rtol=0, atol=1e-14)


def test_second_moments_of_a_fixed_gradient_turn_with_it() -> None:
    """Mean and square of one gradient, over and over, are those of its new coordinates."""
    matrix = planted([4.0, 3.0, 2.0, 1.0])
    old = Projection(3, *LEFT).made("svd", matrix, None, generator)
    assert old.left is not None
    new = Bases(old.left @ torch.linalg.qr(torch.randn(3, 3, generator=generator(1), dtype=torch.float64)).Q, None)
    low, steps, betas = old.project(matrix), 7, (0.9, 0.999)
    state = {"exp_avg": (1 - 0.9**steps) * low, "exp_avg_sq": (1 - 0.999**steps) * low**2, "step": torch.tensor(7.0)}

    rotate_(state, new.turn(old), {"betas": betas})

    assert_close(state["exp_avg"], (1 - 0.9**steps) * new.project(matrix), rtol=0, atol=1e-14)
    assert_close(state["exp_avg_sq"], (1 - 0.999**steps) * new.project(matrix) ** 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["svd", "subspace"])
def test_what_a_matrix_leaves_off_the_diagonal_of_its_own_bases_is_taken_away(kind: str) -> None:
    """Adam without moments would make a full step of it."""
    matrix = torch.randn(24, 16, generator=generator())
    projection = Projection(6, *BOTH)
    bases = projection.made(kind, matrix, None, generator)  # type: ignore[arg-type]
    low = bases.project(matrix)

    cleaned = without_rounding(low)

    assert (low.count_nonzero() > 6) and (cleaned.count_nonzero() == 6)
    assert_close(
        cleaned.diagonal().abs(),
        torch.linalg.svdvals(matrix)[:6],
        rtol=1e-3 if kind == "subspace" else 1e-5,
        atol=0.3 if kind == "subspace" else 0,
    )
