"""The split of a gradient, its bases and its rows: against planted directions, the closed form of a two-layer net, and
numpy.
"""

from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_lowrank.monitors.anatomy.spikes import mean_is_told, outlier, spiked_data
from lightning_lowrank.monitors.anatomy.split import (
    SHARES,
    Basis,
    Sides,
    alignment,
    anatomy,
    deviation,
    horn,
    input_basis,
    signal_basis,
    split,
    top_right,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(k: int, n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(n, k, seed=seed))[0].mT


def basis(k: int, n: int, seed: int = 0) -> Basis:
    return Basis(orthonormal(k, n, seed), torch.ones(k, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_the_four_shares_sum_to_one(seed: int) -> None:
    found = split(gaussian(30, 40, seed=seed), basis(3, 30, seed), basis(2, 40, seed))

    assert_close(sum(found[share] for share in SHARES), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-10)
    assert_close(
        sum(found[f"{share}_chance"] for share in SHARES), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_what_is_planted_in_one_part_is_found_in_it() -> None:
    rows, columns, both = orthonormal(3, 20, 1), orthonormal(3, 30, 2), torch.ones(2, dtype=torch.float64)
    left, right, away = Basis(rows[:2], both), Basis(columns[:2], both), (rows[2], columns[2])
    planted = {"residue": (left.directions[0], away[1]), "interpolant": (left.directions[1], right.directions[0])}
    planted |= {"spike": (away[0], right.directions[1]), "bulk": (away[0], away[1])}

    for share, (u, v) in planted.items():
        found = split(torch.outer(u, v), left, right)
        assert_close(found[share].item(), 1.0)


def test_random_gradients_have_the_shares_of_chance() -> None:
    found = split(gaussian(300, 200), basis(30, 300, 1), basis(20, 200, 2))

    for share in SHARES:
        assert_close(found[share], found[f"{share}_chance"], rtol=0, atol=0.01)


def test_there_are_no_shares_where_no_direction_of_the_inputs_is_told() -> None:
    nothing = Basis(orthonormal(2, 40), torch.zeros(2, dtype=torch.float64))

    assert all(value.isnan() for value in split(gaussian(30, 40), basis(1, 30), nothing).values())


def test_directions_that_do_not_count_have_no_share() -> None:
    both, one = basis(2, 40), Basis(orthonormal(2, 40), torch.tensor([1.0, 0.0], dtype=torch.float64))
    alone = Basis(orthonormal(2, 40)[:1], torch.ones(1, dtype=torch.float64))
    gradient, left = gaussian(30, 40), basis(1, 30)

    assert_close(split(gradient, left, one), split(gradient, left, alone), equal_nan=True)
    assert split(gradient, left, both)["spike"] > split(gradient, left, one)["spike"]


@pytest.mark.parametrize(("rows", "columns", "k"), [(50, 80, 3), (80, 50, 3), (6, 100, 4), (100, 6, 6), (3, 4, 3)])
def test_top_right_vectors_are_those_of_the_decomposition(rows: int, columns: int, k: int) -> None:
    left, right = orthonormal(min(rows, columns), rows, 1), orthonormal(min(rows, columns), columns, 2)
    values = 0.7 ** torch.arange(min(rows, columns), dtype=torch.float64)
    matrix = left.mT * values @ right

    found, vectors = top_right(matrix, k)
    assert_close(found, values[:k], rtol=1e-6, atol=0)
    assert_close((vectors * right[:k]).sum(1).abs(), torch.ones(k, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_products_are_below_horns_bound(seed: int) -> None:
    inputs, signals = gaussian(12, 9, seed=seed), gaussian(12, 7, seed=seed + 100)
    values = [np.linalg.svd(m.numpy(), compute_uv=False)[:2].prod() for m in (signals.mT @ inputs, signals, inputs)]

    found = horn(inputs, signals).item()
    assert_close(found, sqrt(values[0] / (values[1] * values[2])), rtol=1e-3, atol=0)
    assert found <= 1


def test_sides_that_line_up_reach_horns_bound() -> None:
    rows = orthonormal(4, 30).mT

    assert_close(horn(rows * torch.tensor([4.0, 3, 2, 1]), rows * torch.tensor([5.0, 2, 1, 1])).item(), 1.0)


def test_the_deviation_is_that_of_the_whole_matrices_whatever_the_factor() -> None:
    gradient, noise = gaussian(60, 50), gaussian(60, 50, seed=1)
    probes = gaussian(50, 400, seed=2)

    assert deviation(1024 * gradient @ probes, gradient @ probes) < 1e-12
    part = (noise - (noise * gradient).sum() / gradient.square().sum() * gradient).norm() / gradient.norm()
    assert_close(deviation((gradient + 0.1 * noise) @ probes, gradient @ probes), 0.1 * part, rtol=0.1, atol=0)


@pytest.mark.parametrize("k", [1, 3])
def test_signals_of_so_many_outputs_have_so_many_directions(k: int) -> None:
    signals = gaussian(200, k) @ gaussian(k, 40, seed=1) + 0.01 * gaussian(200, 40, seed=2)

    assert signal_basis(signals, 10).size == k


def test_a_mean_is_told_from_that_of_rows_about_zero() -> None:
    told = []
    for seed in range(50):
        rows = gaussian(150, 20, seed=seed)
        shifted = rows + 0.5
        told += [(float(input_basis(rows).live[0]), float(input_basis(shifted).live[0]))]

    assert sum(centred for centred, _ in told) <= 1
    assert sum(shifted for _, shifted in told) == 50


def test_the_mean_and_the_component_are_orthonormal() -> None:
    rows = spiked_data(400, 50, nu=0.3, generator=torch.Generator().manual_seed(0)).inputs + 1.0
    found = input_basis(rows)

    assert found.size == 2
    assert_close(found.directions @ found.directions.mT, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_random_directions_align_as_chance_has_it(alpha: float) -> None:
    rows = spiked_data(400, 200, nu=0.4, alpha=alpha, generator=torch.Generator().manual_seed(0)).inputs
    found = [alignment(basis(2, 200, seed), input_basis(rows)) for seed in range(100)]

    mean = torch.stack([one["alignment"] for one in found]).mean()
    assert_close(mean, found[0]["alignment_chance"], rtol=0.3, atol=0)


def told_of(num_rows: int, width: int, nu: float, alpha: float, seed: int) -> tuple[Any, float]:
    """What the eigenvalues tell, and the squared cosine of the first component with the spike."""
    data = spiked_data(num_rows, width, nu=nu, alpha=alpha, generator=torch.Generator().manual_seed(seed))
    _, values, vectors = np.linalg.svd((data.inputs - data.inputs.mean(0)).numpy(), full_matrices=False)
    cosine = float((vectors[0] @ data.direction.numpy()) ** 2)
    return outlier(torch.tensor(values**2 / num_rows), num_rows, width, num_rows), cosine


@pytest.mark.parametrize("alpha", [0.0, 0.5, 8 / 9])
@pytest.mark.parametrize("nu", [0.25, 0.375])
def test_the_overlap_is_what_it_is_said_to_be(nu: float, alpha: float) -> None:
    found = [told_of(300, 200, nu, alpha, seed) for seed in range(10)]

    assert_close(
        np.mean([float(told.overlap) for told, _ in found]), np.mean([cosine for _, cosine in found]), rtol=0, atol=0.02
    )


@pytest.mark.parametrize("alpha", [0.3, 0.5, 8 / 9])
@pytest.mark.parametrize(("num_rows", "width"), [(150, 200), (600, 100)])
def test_decay_and_strength_are_within_their_errors(num_rows: int, width: int, alpha: float) -> None:
    """Of 20 draws at most one may be three standard errors off, of either."""
    found = [told_of(num_rows, width, 0.25, alpha, seed)[0] for seed in range(20)]

    assert sum(abs(float(told.alpha) - alpha) > 3 * float(told.alpha_error) for told in found) <= 1
    assert sum(abs(float(told.nu) - 0.25) > 3 * float(told.nu_error) for told in found) <= 1
    assert max(float(told.alpha_error) for told in found) < 0.1


def test_without_a_spike_no_strength_is_told() -> None:
    values = torch.linalg.svdvals(gaussian(300, 200)).square() / 300

    assert outlier(values, 300, 200, 300).nu.isnan()
    assert mean_is_told(torch.zeros(200, dtype=torch.float64), values, 300) == 0


def test_no_decay_is_told_from_few_rows() -> None:
    values = torch.linalg.svdvals(gaussian(40, 200)).square() / 40

    assert outlier(values, 40, 200, 40).alpha.isnan()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_an_anatomy_does_not_depend_on_scales(scale: float) -> None:
    data = spiked_data(150, 40, nu=0.3, generator=torch.Generator().manual_seed(0))
    signals = gaussian(150, 1) @ gaussian(1, 30, seed=1) + 0.3 * gaussian(150, 30, seed=2)
    gradient = signals.mT @ data.inputs

    expected = anatomy(Sides(data.inputs.float(), signals.float(), gradient, 150), 1).values
    found = anatomy(Sides(data.inputs.float(), (scale * signals).float(), scale * gradient, 150), 1).values
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 0.0])
def test_an_anatomy_of_a_gradient_that_is_none_is_blank(wrong: float) -> None:
    gradient = torch.full((30, 40), wrong, dtype=torch.float64)
    found = anatomy(Sides(gaussian(50, 40).float(), gaussian(50, 30).float(), gradient, 50), 2).values

    assert all(found[share].isnan() for share in SHARES)
