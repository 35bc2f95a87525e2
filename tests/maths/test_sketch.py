"""Oracles: spectra by construction, numpy's eigenvalues of tridiagonal matrices, and the exact path for what is
summarised.
"""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.lanczos import (
    block_krylov,
    krylov,
    largest_eigenvalue,
    quadrature,
)
from lightning_lowrank.maths.spectra.sketch import _nodes as rest_nodes
from lightning_lowrank.maths.spectra.sketch import estimate, moments, sketch, top
from lightning_lowrank.maths.spectra.spectrum import Spectrum, pooled, svd
from lightning_lowrank.statistics.registry import find
from tests.oracles.spectra import RANKS, entropy_rank, gaussian, generator, singular_values, with_values

SIZE = 500
STEPS = np.arange(1, SIZE + 1)
SPECTRA = {
    "k^-0.5": STEPS**-0.5,
    "k^-1": 1.0 / STEPS,
    "k^-2": 1.0 / STEPS**2,
    "geometric to 1e-3": 1e3 ** -((STEPS - 1) / (SIZE - 1)),
    "geometric to 1e-8": 1e8 ** -((STEPS - 1) / (SIZE - 1)),
    "rank 8": np.linspace(2, 1, SIZE) * (STEPS <= 8),
    "flat": np.ones(SIZE),
    "gaussian": singular_values(gaussian(SIZE, 2 * SIZE)),
}
ESTIMATED = [
    "energy_rank",
    "stable_rank",
    "effective_rank",
    "effective_rank_energy",
    "participation_ratio",
    "nuclear_to_spectral",
]


def reflected(values, shape, seed=0):
    """A matrix with those singular values, by two reflections of a diagonal one."""
    matrix = torch.zeros(shape, dtype=torch.float64)
    matrix.diagonal().copy_(torch.from_numpy(values))
    left, right = gaussian(shape[0], seed=seed), gaussian(shape[1], seed=seed + 1)
    matrix = matrix - 2 * torch.outer(left, left @ matrix) / left.dot(left)
    return (matrix - 2 * torch.outer(matrix @ right, right) / right.dot(right)).float()


@pytest.fixture(scope="module")
def sketches():
    """Four sketches of a matrix of each spectrum."""
    matrices = {name: reflected(values, (SIZE, SIZE + 50)) for name, values in SPECTRA.items()}
    return {name: [sketch(m, generator=generator(seed)) for seed in range(4)] for name, m in matrices.items()}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ESTIMATED)
def test_truth_is_within_the_reported_error(name, spectrum, sketches):
    truth = float(RANKS[name](SPECTRA[spectrum]))
    pairs = [estimate(find(name), s) for s in sketches[spectrum]]

    assert all(abs(value.item() - truth) <= error.item() for value, error in pairs)


@pytest.mark.parametrize("spectrum", ["k^-0.5", "k^-1", "k^-2", "geometric to 1e-3", "rank 8", "flat", "gaussian"])
@pytest.mark.parametrize("name", ESTIMATED)
def test_reported_error_is_of_use(name, spectrum, sketches):
    pairs = [estimate(find(name), s) for s in sketches[spectrum]]

    assert np.median([(error / value).item() for value, error in pairs]) < 0.2


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_energy_is_exact(spectrum, sketches):
    energies = torch.stack([s.energy for s in sketches[spectrum]])

    assert_close(energies, torch.full_like(energies, float((SPECTRA[spectrum] ** 2).sum())), rtol=1e-4, atol=0)


@pytest.mark.parametrize("spectrum", ["k^-0.5", "k^-1", "geometric to 1e-3", "gaussian"])
def test_number_of_values_is_exact(spectrum, sketches):
    counts = torch.stack([s.weights.sum(-1) for s in sketches[spectrum]])

    assert_close(counts, torch.full_like(counts, SIZE))


def test_reported_error_is_of_use_where_directions_fill_the_smaller_space():
    """What the smaller space missed of 80 directions counted as spread over all others: the error was the value."""
    relative = []
    for seed in range(6):
        drawn = generator(100 + seed)
        matrix = torch.randn(500, 80, generator=drawn) @ torch.randn(80, 550, generator=drawn)
        value, error = estimate(find("effective_rank"), sketch(matrix, generator=generator(seed)))
        relative.append((error / value).item())

    assert max(relative) < 0.3


@pytest.mark.parametrize("rest", [1e-2, 3e-3, 1e-3, 3e-4, 1e-4])
@pytest.mark.parametrize("name", ESTIMATED)
def test_truth_is_within_the_reported_error_where_the_rest_is_weak(name, rest):
    """Many equal values with 5e-2 to 2e-6 of the energy: what float32 products of three strong directions leave of it
    was wrong by up to a third, and `effective_rank` by 34 times its error.
    """
    values = np.where(STEPS <= 3, 1.0, rest)
    matrix = reflected(values, (SIZE, SIZE + 50))
    pairs = [estimate(find(name), sketch(matrix, generator=generator(seed))) for seed in range(4)]

    assert all(abs(value.item() - RANKS[name](singular_values(matrix))) <= error.item() for value, error in pairs)


# Within the block of 16, beyond it, beyond the 64 that are taken out one by one.
LOW = [1, 8, 16, 33, 64, 72]
LOW_SPECTRA = {"flat": np.ones, "decaying": lambda rank: np.arange(1, rank + 1) ** -0.7}


def low_rank(rank, spectrum, dtype, shape=(200, 240), num=12):
    """Matrices of that rank before they are rounded: reflected diagonals, whose entries nearly all come from two outer
    products.
    """
    values = np.zeros(min(shape))
    values[:rank] = LOW_SPECTRA[spectrum](rank)
    return torch.stack([reflected(values, shape, seed=10 * seed) for seed in range(num)]).to(dtype)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def of_low_rank(request):
    """Sketches of batches of twelve, wide and tall, and the singular values of the matrices as they are given."""
    made = {}
    for rank in LOW:
        for spectrum in LOW_SPECTRA:
            matrices = low_rank(rank, spectrum, request.param)
            sketched = [sketch(m, generator=generator(rank)) for m in (matrices, matrices.mT)]
            made[rank, spectrum] = singular_values(matrices), sketched
    return made


@pytest.mark.parametrize("name", ESTIMATED)
@pytest.mark.parametrize("rank", LOW)
def test_truth_is_within_the_reported_error_at_low_rank(name, rank, of_low_rank):
    """Three standard errors from eight probes: one in a hundred may be outside, and not far."""
    parts = []
    for spectrum in LOW_SPECTRA:
        values, sketched = of_low_rank[rank, spectrum]
        truth = torch.tensor([float(RANKS[name](one)) for one in values])
        parts += [(value - truth).abs() / error for value, error in (estimate(find(name), s) for s in sketched)]
    parts = torch.cat(parts)

    assert parts.max() < 1.5 and (parts > 1).sum() <= 1


@pytest.mark.parametrize("rank", LOW)
@pytest.mark.parametrize("spectrum", LOW_SPECTRA)
def test_energy_is_exact_at_low_rank(spectrum, rank, of_low_rank):
    values, sketched = of_low_rank[rank, spectrum]
    truth = torch.from_numpy((values**2).sum(-1))

    for one in sketched:
        assert_close(one.energy, truth.expand_as(one.energy), rtol=2e-5, atol=0)


@pytest.mark.parametrize("rank", [rank for rank in LOW if rank <= 64])
def test_directions_of_low_rank_are_taken_out_one_by_one(rank, of_low_rank):
    """All of them: nothing is left to chance. Of equal ones the block finds as many as it is wide."""
    values, sketched = of_low_rank[rank, "decaying"]

    for one in sketched:
        truth = torch.from_numpy(values[:, :rank]).expand(len(one.values), -1, -1)
        assert_close(one.values[..., :rank], truth, rtol=2e-3, atol=0)
        assert (one.weights[..., :rank] == 1).all()


def test_low_rank_in_a_batch_with_what_is_not():
    shape = (90, 120)
    low = low_rank(3, "flat", torch.float64, shape, num=1)[0]
    matrices = torch.stack([gaussian(*shape), torch.zeros(shape), low, torch.full(shape, torch.nan)])
    ranks, errors = estimate(find("effective_rank"), sketch(matrices.float(), generator=generator()))

    assert_close(ranks[1:], torch.tensor([0.0, 3.0, torch.nan], dtype=torch.float64), rtol=1e-3, atol=0, equal_nan=True)
    assert abs(ranks[0] - RANKS["effective_rank"](singular_values(matrices[0].float()))) < errors[0]


TRIALS = {
    "gaussian": gaussian(200, 100),
    "reflected, rank 1": low_rank(1, "flat", torch.float32, num=1)[0].mT,
    "reflected, rank 30": low_rank(30, "flat", torch.float32, num=1)[0].mT,
    "product of rank 3": gaussian(200, 3) @ gaussian(3, 100, seed=1),
    "all equal": torch.ones(200, 100),
    "one entry": torch.eye(200, 100) * (torch.arange(100) == 5),
    "identity": torch.eye(200, 100),
    "zero": torch.zeros(200, 100),
    "narrower than the blocks": gaussian(200, 40),
}


def round_trip_of(matrix):
    def round_trip(vectors):
        there = vectors @ matrix.mT
        return there, there @ matrix

    return round_trip


@pytest.mark.parametrize("matrix", TRIALS)
def test_krylov_basis_is_orthonormal(matrix):
    """Whatever the matrix, and though what a block adds be rounding; and its image is its image."""
    matrix = TRIALS[matrix].float()
    size = matrix.shape[-1]
    left_out = torch.linalg.qr(gaussian(size, 3, dtype=torch.float32, seed=7)).Q.mT
    space = block_krylov(round_trip_of(matrix), gaussian(16, size, dtype=torch.float32, seed=8), 5, without=left_out)
    rows = torch.cat([left_out, space.basis, space.following], -2).double()

    assert space.basis.shape[-2] == min(80, size - 3) and space.following.shape[-2] == min(16, max(0, size - 83))
    assert_close(rows @ rows.mT, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=2e-6)
    assert_close(space.images, space.basis @ matrix.mT, rtol=1e-4, atol=1e-5)


def test_coupling_is_what_leaves_the_krylov_space():
    matrix = gaussian(60, 50)
    space = block_krylov(round_trip_of(matrix), gaussian(4, 50, seed=1), 5)
    back = space.images[-4:] @ matrix

    assert_close(back - back @ space.basis.mT @ space.basis, space.coupling @ space.following)


def test_tail_is_not_estimated(sketches):
    assert torch.isnan(find("numerical_rank")(sketches["k^-1"][0]))


def test_the_last_thousandth_of_the_energy_is_not_counted():
    """With a tail from 0.3 to 1e-5 below three values of 1, the rank for 1e-4 was 994 +- 18 instead of 689."""
    values = np.concatenate([np.ones(3), np.geomspace(0.3, 1e-5, 397)])
    spectrum = sketch(reflected(values, (400, 420)), generator=generator())

    assert torch.isnan(find("energy_rank_0.0001")(spectrum)) and torch.isfinite(find("energy_rank_0.001")(spectrum))


def test_same_seed_same_sketch():
    matrix = gaussian(200, 220, dtype=torch.float32)

    assert torch.equal(sketch(matrix, generator=generator(3)).values, sketch(matrix, generator=generator(3)).values)


def test_transposed_has_the_same_values():
    matrix = reflected(SPECTRA["k^-2"], (SIZE, SIZE))
    one, other = (find("stable_rank")(sketch(m, generator=generator())) for m in (matrix, matrix.mT))

    assert_close(one, other, rtol=1e-4, atol=0)


PRECISIONS = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "all backends": lambda: setattr(torch.backends, "fp32_precision", "bf16"),
    "one backend": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


def precisions():
    """All that can be read of what the user set."""
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = "set for a backend"
    return overall, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def settings():
    before = torch.backends.fp32_precision, *precisions()
    yield
    torch.backends.fp32_precision = before[0]
    torch.set_float32_matmul_precision(before[1])
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before[2:]


@pytest.mark.parametrize("setting", PRECISIONS)
@pytest.mark.parametrize("summary", [moments, top, lambda m: pooled(sketch(m, generator=generator()))])
def test_products_are_in_float32_whatever_the_training_has(summary, setting, settings):
    """Lightning advises "medium" on most GPUs; on some processors it makes products of bfloat16, on GPUs of TF32."""
    matrix = gaussian(300, 350, dtype=torch.float32)
    expected = summary(matrix)
    PRECISIONS[setting]()
    as_set = precisions()
    found = summary(matrix)

    assert torch.equal(found.values, expected.values) and torch.equal(found.weights, expected.weights)
    assert precisions() == as_set


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale):
    matrix = gaussian(200, 220, dtype=torch.float32)
    one, other = (sketch(m, generator=generator()) for m in (matrix, scale * matrix))

    assert_close(other.values, scale * one.values, rtol=1e-3, atol=1e-6 * scale)


def test_batch_and_axis_of_probes():
    result = sketch(gaussian(2, 3, 80, 90), generator=generator(), num_probes=4)

    assert result.weights.shape[:3] == result.coarse.weights.shape[:3] == (4, 2, 3)
    assert result.values.shape[:3] == result.coarse.values.shape[:3] == (1, 2, 3)


def test_not_finite_is_nan_there_only():
    matrices = gaussian(3, 80, 90, dtype=torch.float32)
    matrices[1, 2, 3] = torch.nan
    value, _ = estimate(find("stable_rank"), sketch(matrices, generator=generator()))

    assert torch.equal(value.isnan(), torch.tensor([False, True, False]))


def test_zero_matrix_has_rank_zero():
    value, error = estimate(find("effective_rank"), sketch(torch.zeros(80, 90), generator=generator()))

    assert (value.item(), error.item()) == (0, 0)


def test_exact_spectra_have_no_error():
    _, error = estimate(find("stable_rank"), svd(gaussian(3, 20, 30)))

    assert_close(error, torch.zeros(3, dtype=torch.float64))


def test_error_of_independent_probes_is_three_standard_errors():
    """For the mean of probes the jackknife is the textbook formula."""
    values = gaussian(6).abs()[:, None]
    probes = Spectrum(values, torch.ones_like(values), (1, 1), whole=False, num_probes=6)
    value, error = estimate(lambda s: (s.weights * s.values).sum(-1), probes)

    assert_close(error, 3 * values.std() / 6**0.5 + 1e-3 * value)


@pytest.mark.parametrize("shape", [(3, 3), (1, 5), (40, 60), (200, 150)])
@pytest.mark.parametrize("name", ["participation_ratio", "frobenius_norm"])
def test_moments_are_exact(name, shape):
    matrix = gaussian(2, *shape, dtype=torch.float32)

    assert_close(find(name)(moments(matrix)), find(name)(svd(matrix)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(3, 3), (1, 5), (40, 60), (200, 150), (600, 700)])
@pytest.mark.parametrize("name", ["stable_rank", "spectral_norm", "participation_ratio", "frobenius_norm"])
def test_top_is_within_its_stated_error(name, shape):
    matrix = gaussian(2, *shape, dtype=torch.float32)

    assert_close(find(name)(top(matrix)), find(name)(svd(matrix)), rtol=1e-5, atol=0)


def test_top_is_deterministic():
    matrix = gaussian(40, 60)

    assert torch.equal(top(matrix).values, top(matrix).values)


@pytest.mark.parametrize("summary", [moments, top])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_summaries_at_any_scale(summary, scale):
    matrix = gaussian(40, 60, dtype=torch.float32)

    assert_close(summary(scale * matrix).values, scale * summary(matrix).values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("summary", [moments, top])
def test_summaries_of_zero_and_nan(summary):
    ranks = find("participation_ratio")(
        summary(torch.stack([torch.zeros(4, 5), torch.full((4, 5), torch.nan), torch.eye(4, 5)]))
    )

    assert_close(ranks, torch.tensor([0.0, torch.nan, 4.0], dtype=torch.float64), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("summary", [moments, top])
def test_summaries_of_complex_matrices(summary):
    matrix = torch.complex(gaussian(20, 30), gaussian(20, 30, seed=1))

    assert_close(
        find("participation_ratio")(summary(matrix)), find("participation_ratio")(svd(matrix)), rtol=1e-6, atol=0
    )


def symmetric(size=30):
    matrix = gaussian(size, size)
    return matrix + matrix.T


def test_lanczos_of_all_steps_has_the_eigenvalues():
    matrix = symmetric()
    tridiagonal = krylov(lambda v: v @ matrix, gaussian(30, seed=1), 30).projected

    assert_close(
        torch.from_numpy(np.linalg.eigvalsh(tridiagonal.numpy())), torch.from_numpy(np.linalg.eigvalsh(matrix.numpy()))
    )


def test_lanczos_stops_where_the_space_is_exhausted():
    """Three distinct eigenvalues: three steps are all there is."""
    diagonal = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).repeat(10)
    nodes, weights = quadrature(krylov(lambda v: diagonal * v, gaussian(30), 8).projected)

    assert_close(nodes[weights > 1e-8], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("power", range(10))
def test_quadrature_is_exact_for_moments(power):
    matrix, start = symmetric() / 10, gaussian(30, seed=1)
    nodes, weights = quadrature(krylov(lambda v: v @ matrix, start, 5).projected)
    expected = start @ torch.linalg.matrix_power(matrix, power) @ start / start.square().sum()

    assert_close((weights * nodes**power).sum(), expected)


def test_quadrature_weights_come_from_the_start_vector():
    matrix, start = symmetric(6), gaussian(6, seed=1)
    vectors = np.linalg.eigh(matrix.numpy())[1]
    expected = (vectors.T @ start.numpy()) ** 2 / start.square().sum().item()

    assert_close(quadrature(krylov(lambda v: v @ matrix, start, 6).projected)[1], torch.from_numpy(expected))


def quadratures(matrix, start, steps):
    """Nodes, and weights of each start vector, of Gauss and of Gauss-Radau quadrature."""
    space = block_krylov(round_trip_of(matrix), start, steps)
    images = torch.cat([space.images, space.following @ matrix.mT])
    starts = start @ space.basis[: len(start)].mT / torch.linalg.vector_norm(start, dim=-1, keepdim=True)
    size = len(space.basis)
    nodes, weights = rest_nodes(images @ images.mT, starts, size, torch.tensor(0.0))
    return (nodes[:size], 2 * weights[:, :size]), (nodes[size:], 2 * weights[:, size:])


@pytest.mark.parametrize("rule", ["Gauss", "Radau"])
@pytest.mark.parametrize("power", range(1, 8))
def test_block_quadrature_is_exact_for_moments(power, rule):
    matrix, start = gaussian(40, 30) / 10, gaussian(3, 30, seed=1)
    nodes, weights = quadratures(matrix, start, 4)[rule == "Radau"]
    gram = torch.linalg.matrix_power(matrix.T @ matrix, power)

    assert_close((weights * nodes**power).sum(-1), ((start @ gram) * start).sum(-1) / start.square().sum(-1))


def test_gauss_and_radau_bracket_sums_of_singular_values():
    matrix, start = gaussian(40, 40), gaussian(3, 40, seed=1)
    values, vectors = np.linalg.eigh((matrix.T @ matrix).numpy())
    truth = torch.from_numpy((start.numpy() @ vectors) ** 2 @ np.sqrt(values)) / start.square().sum(-1)
    above, below = ((w * n.sqrt()).sum(-1) for n, w in quadratures(matrix, start, 4))

    assert (below < truth).all() and (truth < above).all()


def test_largest_eigenvalue_of_a_batch():
    grams = gaussian(3, 50, 60)
    grams = grams @ grams.mT
    largest = largest_eigenvalue(lambda v: (v[..., None, :] @ grams)[..., 0, :], gaussian(3, 50), 50)

    assert_close(largest, torch.from_numpy(np.linalg.eigvalsh(grams.numpy())[:, -1].copy()))


def test_entropy_of_a_known_matrix():
    """The oracle itself, on a spectrum done by hand."""
    assert_close(entropy_rank(singular_values(with_values([1.0, 1.0], (5, 6)))), 2.0, rtol=1e-6, atol=0)
