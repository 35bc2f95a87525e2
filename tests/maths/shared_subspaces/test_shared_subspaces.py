"""Oracles: numpy's SVD of the dense matrix of models, scipy's linkage, planted subspaces, and draws of Gaussians."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.linalg import subspace_angles
from scipy.spatial.distance import squareform
from torch import Tensor

from lightning_lowrank.maths.shared_subspaces.components import components, cosines, explained, gaussian_share
from lightning_lowrank.maths.shared_subspaces.distances import apart, linkage
from lightning_lowrank.maths.shared_subspaces.extension import Subspace, extended
from lightning_lowrank.maths.shared_subspaces.left_out import held_by, left_out
from lightning_lowrank.maths.shared_subspaces.modes import modes

N, P = 9, 60
KS = [1, 2, 4]


@pytest.fixture
def models() -> Tensor:
    """Rows about a mean, some directions stronger than others."""
    generator = torch.Generator().manual_seed(0)
    strengths = torch.linspace(3, 0.3, P, dtype=torch.float64)
    return torch.randn(N, P, generator=generator, dtype=torch.float64) * strengths + 0.7


def svd(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies and right singular vectors of the centred rows, those of rank N - 1."""
    _, values, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return values[: len(rows) - 1] ** 2, right[: len(rows) - 1]


def test_components_are_those_of_the_dense_matrix(models: Tensor) -> None:
    found = components(models @ models.T)

    energies, right = svd(models.numpy())
    basis = (found.weights @ models).numpy()
    assert_allclose(found.values.numpy(), energies)
    assert_allclose(np.abs(basis @ right.T), np.eye(N - 1), atol=1e-9)
    assert_allclose(found.coefficients.numpy(), (models - models.mean(0)).numpy() @ basis.T, atol=1e-9)


def test_explained_energy_is_that_of_the_dense_matrix(models: Tensor) -> None:
    energies, _ = svd(models.numpy())

    assert_allclose(explained(models @ models.T, KS), [energies[:k].sum() / energies.sum() for k in KS])
    assert_allclose(explained(models @ models.T, [N - 1]), 1)


def test_equal_models_have_no_components_and_nothing_explained() -> None:
    same = torch.ones(4, 6, dtype=torch.float64)

    assert len(components(same @ same.T).values) == 0
    assert np.isnan(explained(same @ same.T, [1])).all()


@pytest.mark.parametrize(("rows", "columns"), [(12, 40000), (31, 100), (20, 10)])
def test_the_null_is_what_gaussian_models_explain(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    ks = [1, 3, 6]
    drawn = [torch.randn(rows + 1, columns, generator=generator, dtype=torch.float64) for _ in range(8)]

    found = gaussian_share(rows, columns, ks)

    assert_allclose(found, np.mean([explained(x @ x.T, ks) for x in drawn], 0), rtol=0.1)
    if columns > 1000 * rows:
        assert_allclose(found, [k / rows for k in ks], rtol=0.05)


def test_what_others_hold_of_a_model_is_that_of_the_dense_matrix(models: Tensor) -> None:
    expected = []
    for i in range(N):
        x, rest = models[i].numpy(), np.delete(models.numpy(), i, 0)
        m, (_, right) = rest.mean(0), svd(rest)
        away = [np.linalg.norm(x - m - right[:k].T @ right[:k] @ (x - m)) ** 2 for k in KS]
        basis = [np.linalg.norm(right[:k] @ x) ** 2 for k in KS]
        energy = x @ x
        expected.append([1 - np.linalg.norm(x - m) ** 2 / energy, *(b / energy for b in basis)])
        expected[-1] += [1 - a / energy for a in away]

    found = left_out(models @ models.T, KS)

    assert_allclose([found.mean, *found.basis, *found.mean_and_basis], np.mean(expected, 0))


def test_a_model_inside_the_span_is_held_whole_and_noise_by_chance() -> None:
    generator = torch.Generator().manual_seed(2)
    planted = torch.randn(16, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 5000, generator=generator, dtype=torch.float64
    )
    noise = torch.randn(16, 5000, generator=generator, dtype=torch.float64)

    assert_allclose(left_out(planted @ planted.T, [3]).mean_and_basis, [1.0])
    assert_allclose(left_out(noise @ noise.T, [8]).basis, [8 / 5000], rtol=0.35)


def test_what_members_hold_of_others_is_that_of_the_dense_matrix(models: Tensor) -> None:
    own, theirs = models.numpy()[:5], models.numpy()[5:]
    _, right = svd(own)
    away = theirs - theirs.mean(0)
    expected = [(np.linalg.norm(away @ right[:k].T) / np.linalg.norm(away)) ** 2 for k in KS]

    assert_allclose(held_by(models @ models.T, range(5), range(5, N), KS), expected)


def test_distances_of_groups_are_scipys_angles(models: Tensor) -> None:
    bases = [svd(group)[1][:3] for group in (models.numpy()[:5], models.numpy()[5:])]
    angles = subspace_angles(bases[0].T, bases[1].T)

    found = apart(models @ models.T, range(5), range(5, N), 3, P)

    assert_allclose(found.overlap, np.mean(np.cos(angles) ** 2))
    assert_allclose(found.distance, np.linalg.norm(angles) / (np.sqrt(3) * np.pi / 2))


def test_random_subspaces_are_at_the_distance_of_chance() -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(20, 400, generator=generator, dtype=torch.float64)

    found = apart(noise @ noise.T, range(10), range(10, 20), 8, 400)

    assert_allclose(found.overlap, found.overlap_chance, rtol=0.3)
    assert_allclose(found.distance, found.distance_chance, rtol=0.02)


def test_linkage_is_scipys(models: Tensor) -> None:
    distances = 1 - cosines(models @ models.T)

    found = linkage(distances)

    expected = scipy_linkage(squareform(distances.numpy(), checks=False), "average")
    assert_allclose(np.array(found), expected)


def left_of_unfolding(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors and energies of centred tensors, one axis by all others."""
    unfolded = np.moveaxis(x - x.mean(0), axis + 1, 0).reshape(x.shape[axis + 1], -1)
    vectors, values, _ = np.linalg.svd(unfolded, full_matrices=False)
    return vectors, values**2


def within(x: np.ndarray, bases: list[np.ndarray]) -> float:
    """Part of the energy of a tensor of three axes along given directions of each."""
    return float(np.linalg.norm(np.einsum("abc,ai,bj,ck->ijk", x, *bases)) ** 2 / np.linalg.norm(x) ** 2)


def test_modes_are_those_of_the_dense_unfoldings() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, 4, 5, 3, generator=generator, dtype=torch.float64)
    x[:, 0] *= 4

    *found, together = modes(lambda i: x[i], 6, [1, 2], [2])

    own, rest = x[2].numpy(), np.delete(x.numpy(), 2, 0)
    for one in found:
        assert one.axis is not None
        energies = left_of_unfolding(x.numpy(), one.axis)[1]
        assert_allclose(one.explained, [energies[:k].sum() / energies.sum() for k in (1, 2)])
        left = left_of_unfolding(rest, one.axis)[0]
        unfolded = np.moveaxis(own, one.axis, 0).reshape(one.size, -1)
        kept = [np.linalg.norm(left[:, :k].T @ unfolded) ** 2 / np.linalg.norm(own) ** 2 for k in (1, 2)]
        assert_allclose(one.left_out, kept)
    assert [one.axis for one in found] == [0, 1, 2] and together.axis is None and together.size == 60
    bases = [left_of_unfolding(rest, axis)[0] for axis in range(3)]
    assert_allclose(together.left_out, [within(own, [b[:, :k] for b in bases]) for k in (1, 2)])
    assert_allclose(together.random, [1 / 60, 8 / 60])
    inside, away = [left_of_unfolding(x.numpy(), axis)[0][:, :2] for axis in range(3)], (x - x.mean(0)).numpy()
    weights = [np.linalg.norm(one) ** 2 for one in away]
    assert_allclose(together.explained[1], np.average([within(one, inside) for one in away], weights=weights))


def test_nulls_of_modes_are_those_of_noise() -> None:
    x = torch.randn(5, 40, 60, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    for one in modes(lambda i: x[i], 5, [4, 16], range(5)):
        assert_allclose(one.explained, one.null, rtol=0.1, atol=0.01)
        assert_allclose(one.left_out, one.random, rtol=0.15, atol=0.003)


def test_a_subspace_extended_by_one_model_is_that_of_all(models: Tensor) -> None:
    first = models[:-1]
    part = components(first @ first.T)
    before = Subspace(N - 1, first.mean(0), part.weights @ first, part.values)

    after = extended(before, models[-1], N)

    energies, right = svd(models.numpy())
    assert after.num_models == N
    assert_allclose(after.mean, models.mean(0))
    assert_allclose(after.values, energies)
    assert_allclose(np.abs(after.basis.numpy() @ right.T), np.eye(N - 1), atol=1e-7)
    assert_allclose(after.rebuilt(after.project(models[3])), models[3], atol=1e-7)
