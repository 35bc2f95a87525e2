"""Oracles: operators whose eigenvalues and eigenvectors are known by construction, and numpy's of Hessians of a net in
training.
"""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_lowrank.maths.operators.eigenspaces import (
    energy_share,
    layer_energies,
    of_directions,
    overlap,
    rayleigh_quotient,
    sines,
    top_eigenpairs,
    widened,
)
from lightning_lowrank.maths.operators.operators import Layout, Operator
from tests.dispatch import Waits
from tests.operators import SPECTRA, with_spectrum
from tests.oracles.spectra import gaussian, generator

SIZE = 500


def ends(values, k, lowest):
    """By sorting."""
    padded = np.sort(np.concatenate([values, np.zeros(SIZE - len(values))]))[::-1]
    return torch.tensor(np.concatenate([padded[:k], padded[len(padded) - lowest :]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["zero", "rank 1", "rank 3", "repeated", "identity"])
def test_both_ends_are_found_without_ghosts(name, dtype):
    """Where the Krylov space is exhausted, at step 1 for the zero operator and the identity, the search goes on outside
    of it.
    """
    operator, _ = with_spectrum(SPECTRA[name], dtype=dtype)
    found = top_eigenpairs(operator, 5, lowest=1, num_products=10, generator=generator())

    assert_close(found.values, ends(SPECTRA[name], 5, 1), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("name", "k", "lowest"), [("clustered", 2, 0), ("indefinite", 2, 1)])
def test_outliers_are_found(name, k, lowest):
    operator, _ = with_spectrum(SPECTRA[name])
    found = top_eigenpairs(operator, k, lowest=lowest, num_products=12, generator=generator())

    assert_close(found.values, ends(SPECTRA[name], k, lowest), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SPECTRA)
def test_vectors_are_orthonormal(name):
    operator, _ = with_spectrum(SPECTRA[name])
    found = top_eigenpairs(operator, 5, lowest=1, num_products=12, generator=generator())

    assert_close(found.vectors @ found.vectors.T, torch.eye(6), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SPECTRA)
def test_images_and_residuals_are_those_of_the_operator(name):
    operator, _ = with_spectrum(SPECTRA[name])
    found = top_eigenpairs(operator, 5, lowest=1, num_products=8, generator=generator())
    images = torch.stack([operator.multiply(v) for v in found.vectors])
    residuals = torch.linalg.vector_norm(images - found.values.float()[:, None] * found.vectors, dim=-1)

    assert_close(found.images(), images, rtol=0, atol=1e-4)
    assert_close(found.residuals.float(), residuals, rtol=1e-3, atol=3e-5)


def test_near_each_value_there_is_an_eigenvalue():
    """Within the residual, converged or not."""
    operator, _ = with_spectrum(SPECTRA["indefinite"], dtype=torch.float64)
    found = top_eigenpairs(operator, 5, lowest=2, num_products=7, generator=generator())
    distances = (found.values[:, None] - torch.tensor(SPECTRA["indefinite"], dtype=torch.float64)).abs().amin(1)

    assert (distances <= found.residuals).all()


def test_old_eigenvectors_are_found_again_by_as_many_products():
    values = [9.0, 7.0, 5.0, 3.0, -4.0]
    operator, vectors = with_spectrum(values)
    found = top_eigenpairs(operator, 4, lowest=1, start=vectors[:5], num_products=5, generator=generator())

    assert_close(found.values, torch.tensor(values, dtype=torch.float64), rtol=0, atol=2e-3)


def test_old_eigenvectors_that_are_not_finite_are_left_out():
    operator, vectors = with_spectrum([9.0, 7.0])
    spoilt = torch.where(torch.arange(2)[:, None] == 0, torch.nan, vectors[:2])
    found = top_eigenpairs(
        operator, 2, start=spoilt, further=torch.zeros(1, SIZE), num_products=6, generator=generator()
    )

    assert_close(found.values, torch.tensor([9.0, 7.0], dtype=torch.float64), rtol=1e-4, atol=0)


def test_an_operator_that_is_not_finite_gives_nan():
    operator = Operator(9, lambda v: v * torch.nan, torch.device("cpu"), torch.float32)

    assert top_eigenpairs(operator, 2, num_products=4, generator=generator()).values.isnan().all()


def test_no_more_products_are_made_than_allowed():
    operator, _ = with_spectrum(SPECTRA["clustered"])
    calls = []
    counted = Operator(SIZE, lambda v: calls.append(1) or operator.multiply(v), operator.device, operator.dtype)
    top_eigenpairs(counted, 3, num_products=7, generator=generator())

    assert len(calls) == 7


def images_of_signs(operator, num=4):
    signs = torch.randint(0, 2, (num, SIZE), generator=generator(3)).to(operator.dtype) * 2 - 1
    return torch.stack([operator.multiply(row) for row in signs])


@pytest.mark.parametrize("values", [[9.0, 8.0, 7.0, 6.0, 5.0], [9.0, 9.0, 9.0, 6.0, 5.0]], ids=["absent", "repeated"])
def test_what_the_start_vector_misses_is_found_in_images_of_random_vectors(values):
    """An eigenvector of which it has nothing, and one more of the same eigenvalue."""
    operator, vectors = with_spectrum([*values, *np.linspace(1.0, 0.1, 40)], dtype=torch.float64)
    start = vectors[[0, 1, 3, 4]] if values[2] < values[1] else vectors[[0, 3, 4]]
    pairs = top_eigenpairs(operator, 3, start=start, num_products=5, generator=generator())
    found = widened(operator, pairs, images_of_signs(operator), num_products=2)
    truth = torch.tensor(values[:3], dtype=torch.float64)

    assert ((pairs.values - truth) / pairs.errors).abs().max() > 5
    assert ((found.values - truth).abs() <= found.errors + 1e-9).all()
    assert_close(found.values, truth, rtol=0.04, atol=0)


@pytest.mark.parametrize("name", ["zero", "rank 1", "rank 3", "identity", "indefinite"])
def test_a_wider_space_is_orthonormal_and_has_its_images(name):
    operator, _ = with_spectrum(SPECTRA[name], dtype=torch.float64)
    pairs = top_eigenpairs(operator, 3, lowest=1, num_products=6, generator=generator())
    found = widened(operator, pairs, images_of_signs(operator), lowest=1, num_products=2)
    images = torch.stack([operator.multiply(v) for v in found.vectors])
    residuals = torch.linalg.vector_norm(images - found.values[:, None] * found.vectors, dim=-1)

    assert_close(found.vectors @ found.vectors.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(found.images(), images, rtol=0, atol=1e-9)
    assert_close(found.residuals, residuals, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_pairs_of_an_operator_in_other_units_are_the_same(factor):
    """Squares of its entries are beyond the range of float32."""
    plain, _ = with_spectrum(SPECTRA["indefinite"])
    scaled = Operator(SIZE, lambda v: factor * plain.multiply(v), plain.device, plain.dtype)
    one, other = (
        widened(operator, pairs, images_of_signs(operator), lowest=1, num_products=2)
        for operator in (plain, scaled)
        for pairs in [top_eigenpairs(operator, 3, lowest=1, num_products=6, generator=generator())]
    )

    for name in ("values", "errors", "residuals"):
        assert_close(getattr(other, name) / factor, getattr(one, name), rtol=1e-3, atol=1e-5, msg=name)
    assert_close(overlap(one.vectors, other.vectors), torch.tensor(1.0), rtol=0, atol=1e-5)


def test_errors_are_squares_of_residuals_over_gaps_where_values_are_apart():
    """By the bound of Kato and Temple: the truth is within it, and it is far below the residual."""
    operator, _ = with_spectrum([9.0, *np.linspace(1.0, 0.5, 30)], dtype=torch.float64)
    found = top_eigenpairs(operator, 1, num_products=4, generator=generator())
    left_open = found.errors[0] - (found.values[0] - found.before[0]).abs()

    assert found.residuals[0] > 1e-3
    assert 9 - found.values[0] <= 1.1 * left_open < 0.1 * found.residuals[0]


def test_too_few_products_are_refused():
    operator, _ = with_spectrum([1.0])

    with pytest.raises(ValueError, match="at least 6 products, not 5"):
        top_eigenpairs(operator, 5, lowest=1, num_products=5, generator=generator())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_tiny_operator_gives_all_that_there_is(size):
    operator, _ = with_spectrum(np.arange(1.0, size + 1), size=size)
    found = top_eigenpairs(operator, 5, lowest=1, num_products=10, generator=generator())

    assert_close(found.values.sort().values, torch.arange(1.0, size + 1, dtype=torch.float64), rtol=1e-5, atol=0)


def test_nothing_waits_for_the_device():
    operator, vectors = with_spectrum(SPECTRA["clustered"])
    draws = generator()
    with Waits("cpu") as waits:
        top_eigenpairs(operator, 3, lowest=1, start=vectors[:4], further=vectors[4:5], num_products=8, generator=draws)

    assert waits.seen.keys() <= {"lift_fresh"}


def test_autocast_does_not_reach_in():
    operator, _ = with_spectrum([9.0, 7.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = top_eigenpairs(operator, 2, num_products=6, generator=generator())

    assert_close(found.values, torch.tensor([9.0, 7.0], dtype=torch.float64), rtol=1e-4, atol=0)


def digits():
    """Pooled to 4 x 4, so that whole Hessians are small."""
    images, labels = load_digits(return_X_y=True)
    pooled = F.avg_pool2d(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8, 2)
    return pooled.flatten(1), torch.tensor(labels)


def whole_hessian(loss, params):
    """All rows in one batched backward pass."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)])
    rows = torch.autograd.grad(gradient, params, torch.eye(len(gradient)), retain_graph=True, is_grads_batched=True)
    return gradient.detach(), torch.cat([r.flatten(1) for r in rows], 1)


@pytest.fixture(scope="module")
def probes():
    """Of a net in training, on the minibatch of the step: gradient, operator, and the eigenvalues and eigenvectors by
    numpy.
    """
    images, labels = digits()
    torch.manual_seed(0)
    model, draws, found = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10)), generator(1), []
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, 0.05, momentum=0.9)
    for step in range(9 * 25):
        batch = torch.randint(0, len(images), (64,), generator=draws)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        if step % 25 == 0:
            gradient, matrix = whole_hessian(loss, params)
            values, vectors = np.linalg.eigh(matrix.numpy())
            operator = Operator(len(matrix), lambda v, matrix=matrix: matrix @ v, matrix.device, matrix.dtype)
            found.append((gradient, operator, values[::-1].copy(), torch.from_numpy(vectors.T[::-1].copy())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def errors(probes, pairs, num_products, k=5):
    """Of the first eigenvalue, started from the true eigenvectors of another probe; and how far the subspaces are
    apart.
    """
    for now, before in pairs:
        gradient, operator, values, vectors = probes[now]
        start = probes[before][3][:k]
        found = top_eigenpairs(
            operator, k, start=start, further=gradient[None], num_products=num_products, generator=generator()
        )
        yield abs(found.values[0].item() / values[0] - 1), overlap(vectors[:k], start).item()


def test_the_sharpness_of_a_net_in_training_takes_five_products(probes):
    found = list(errors(probes, [(i, i - 1) for i in range(2, 9)], 5))

    assert all(error < 0.01 and shared > 0.5 for error, shared in found)


def test_the_sharpness_takes_eight_products_where_the_subspace_has_moved(probes):
    found = list(errors(probes, [(i, 0) for i in range(1, 9)] + [(0, i) for i in range(1, 9)], 8))

    assert all(error < 0.01 and 0.05 < shared < 0.45 for error, shared in found)


def test_five_eigenvalues_are_followed_by_twelve_products(probes):
    found, worst = None, []
    for gradient, operator, values, _ in probes:
        start = found.vectors if found else None
        found = top_eigenpairs(operator, 5, start=start, further=gradient[None], num_products=12, generator=generator())
        worst.append((found.values.numpy() / values[:5] - 1).tolist())

    assert np.abs(worst[1:]).mean() < 0.02


def test_overlap_is_the_mean_squared_cosine():
    basis = torch.eye(6)

    assert_close(overlap(basis[:4], basis[2:6]), torch.tensor(0.5))


def test_overlap_of_random_subspaces_is_their_dimension_over_that_of_the_space():
    found = [overlap(with_spectrum([], size=40, seed=i)[1][:4], torch.eye(40)[:4]).item() for i in range(30)]

    assert_close(float(np.mean(found)), 4 / 40, rtol=0.15, atol=0)


def test_energy_shares_of_a_whole_basis_add_up():
    _, vectors = with_spectrum([], size=8)
    shares = [energy_share(1e-20 * gaussian(8, dtype=torch.float32), rows) for rows in vectors.split(2)]

    assert_close(sum(shares), torch.tensor(1.0))


def test_the_zero_vector_has_no_energy_anywhere():
    assert energy_share(torch.zeros(5), torch.eye(5)[:2]) == 0


def test_a_vector_that_points_nowhere_has_no_rayleigh_quotient():
    operator, _ = with_spectrum(SPECTRA["rank 3"])

    assert rayleigh_quotient(operator, torch.zeros(operator.size)).isnan()


def test_the_rayleigh_quotient_of_an_eigenvector_is_its_eigenvalue():
    operator, vectors = with_spectrum([4.0, -2.0])

    assert_close(rayleigh_quotient(operator, -3 * vectors[1]), torch.tensor(-2.0))


def test_layer_energies_of_unit_vectors_sum_to_one():
    _, vectors = with_spectrum([], size=10)
    layout = Layout.of({"a": torch.zeros(2, 3), "b": torch.zeros(4)})

    assert_close(layer_energies(vectors, layout).sum(-1), torch.ones(10))
    assert_close(layer_energies(vectors, layout)[:, 1], vectors[:, 6:].square().sum(-1))


def spans(seed: int, num_products: int):
    """The top of an operator with a slow decay, as it was found, and its eigenvectors."""
    operator, exact = with_spectrum(0.8 ** np.arange(60), dtype=torch.float64, seed=seed)
    pairs = top_eigenpairs(operator, 5, num_products=num_products, generator=generator(seed))
    return pairs, exact[:5]


@pytest.mark.parametrize(("num_products", "missed"), [(7, 6), (9, 1), (12, 0), (16, 0), (24, 0)])
def test_directions_are_no_further_from_the_top_than_their_sines_say(num_products, missed):
    """Oracle: angles to eigenvectors that are known by construction. Where little is known the eigenvalue after the top
    is not known either, and a few of thirty sines are too small; all within a factor of 1.5 otherwise.
    """
    beyond = 0
    for seed in range(6):
        pairs, exact = spans(seed, num_products)
        true = (1 - (pairs.vectors @ exact.T).square().sum(1)).clamp(min=0).sqrt()
        beyond += int((true > 1.5 * sines(pairs, 5) + 1e-6).sum())

    assert beyond <= missed


def test_sines_fall_to_rounding_with_the_products():
    few, more, all_ = (float(sines(spans(0, n)[0], 5).mean()) for n in (7, 12, 24))

    assert few > 0.2 > 0.02 > more > 1e-4 > 1e-12 > all_


@pytest.mark.parametrize("num_products", [9, 12, 16])
def test_parts_within_a_span_are_within_their_errors_of_those_within_the_eigenvectors(num_products):
    for seed in range(6):
        (pairs, exact), (later, exact_later) = spans(seed, num_products), spans(seed, num_products + 1)
        off = sines(pairs, 5)
        shares = of_directions(pairs.vectors.square().mean(0), off)
        both = of_directions(overlap(later.vectors, pairs.vectors), off, sines(later, 5))
        known = both.error < 1

        assert bool(((shares.value - exact.square().mean(0)).abs() <= shares.error + 1e-12).all())
        assert not known or abs(both.value - overlap(exact_later, exact)) <= both.error + 1e-12


def test_a_part_that_could_be_anything_is_blank():
    unknown = of_directions(torch.tensor(0.5), torch.ones(3))
    known = of_directions(torch.tensor([0.5, 0.0]), torch.tensor([0.0, 0.3, 0.0]))

    assert unknown.value.isnan() and unknown.error == 1
    # One of three directions is off: a third of its sine, or less where the part is none.
    assert_close(known.error, torch.tensor([0.1, 0.03]))
