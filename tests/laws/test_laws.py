"""Laws that every registered statistic obeys, for free: nothing here names one, but where a law is about it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank import statistics
from lightning_lowrank.maths.spectra.spectrum import Spectrum, svd
from lightning_lowrank.maths.spectra.subspaces import top_subspace
from lightning_lowrank.statistics.registry import REGISTERED, find
from tests.catalogue import names
from tests.dispatch import Waits
from tests.oracles.spectra import RANKS, gaussian, geometric, singular_values, with_values

PARAMETERS = {"epsilon": (0.01, 0.5), "p": (0.5, 1, 1.5, 2)}


def evaluate(name, *matrices):
    found = find(name)
    return found(
        *(svd(m) if kind is Spectrum else top_subspace(m, 3) for kind, m in zip(found.takes, matrices, strict=False))
    )


every = pytest.mark.parametrize("name", names())
ranks = pytest.mark.parametrize("name", [n for n in names() if find(n).unit == "directions"])


@pytest.fixture
def pair():
    """Two batches of matrices with more than noise in them; second one near the first."""
    first = gaussian(3, 24, 16) @ torch.diag(torch.logspace(0, -2, 16, dtype=torch.float64))
    return first, first + 0.01 * gaussian(3, 24, 16, seed=1)


@every
def test_batch_is_one_by_one(name, pair):
    expected = torch.stack([evaluate(name, *(m[i] for m in pair)) for i in range(3)])

    assert_close(evaluate(name, *pair), expected, rtol=1e-9, atol=1e-12, equal_nan=True)


@every
def test_two_batch_axes(name, pair):
    batched = [m.expand(2, *m.shape) for m in pair]

    assert_close(evaluate(name, *batched), evaluate(name, *pair).expand(2, -1), rtol=1e-9, atol=1e-12, equal_nan=True)


@every
def test_transposing_changes_nothing(name, pair):
    assert_close(evaluate(name, *(m.mT for m in pair)), evaluate(name, *pair), rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", [n for n in names() if Spectrum in find(n).takes and not find(n).reads_shape])
def test_only_what_says_so_reads_the_shape(name, pair):
    spectra = [svd(m) for m in pair[: len(find(name).takes)]]

    assert_close(find(name)(*(replace(s, shape=(16, 900)) for s in spectra)), find(name)(*spectra), rtol=0, atol=0)


@every
def test_rotating_changes_nothing(name, pair):
    left, right = torch.linalg.qr(gaussian(24, 24))[0], torch.linalg.qr(gaussian(16, 16))[0]

    assert_close(
        evaluate(name, *(left @ m @ right for m in pair)), evaluate(name, *pair), rtol=1e-8, atol=1e-10, equal_nan=True
    )


@every
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e12, 1e30])
def test_scale(name, scale, pair):
    found, single = find(name), [m.float() for m in pair]
    expected = evaluate(name, *single) * (1 if found.scale_free else scale)

    assert_close(evaluate(name, *(scale * m for m in single)), expected, rtol=1e-5, atol=0, equal_nan=True)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
def test_dtype_of_the_matrix_is_widened(name, dtype, pair):
    stored = [m.to(dtype) for m in pair]
    wide = torch.complex128 if dtype.is_complex else torch.float64

    assert_close(
        evaluate(name, *stored), evaluate(name, *(m.to(wide) for m in stored)), rtol=1e-9, atol=1e-12, equal_nan=True
    )


@every
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 7), (7, 1), (1, 1)])
def test_thin_matrices_give_a_number_per_matrix(name, shape):
    matrix = gaussian(2, *shape)
    result = evaluate(name, matrix, matrix)

    assert result.shape == (2,)


@ranks
@pytest.mark.parametrize("shape", [(0, 5), (1, 7), (7, 1), (4, 6), (40, 40)])
def test_ranks_are_total(name, shape):
    assert torch.isfinite(evaluate(name, gaussian(*shape)))


@ranks
def test_zero_matrix_has_rank_zero(name):
    assert_close(evaluate(name, torch.zeros(2, 4, 5)), torch.zeros(2, dtype=torch.float64))


@ranks
@pytest.mark.parametrize("shape", [(12, 8), (64, 96), (300, 300)])
def test_rank_one_has_rank_one(name, shape):
    matrix = torch.outer(gaussian(shape[0]), gaussian(shape[1], seed=1)).float()

    assert_close(evaluate(name, matrix), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-3)


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_nan_there_only(name, value, pair):
    expected = evaluate(name, *pair)
    expected[1] = torch.nan
    pair[0][1, 2, 3] = value

    assert_close(evaluate(name, *pair), expected, rtol=1e-9, atol=1e-12, equal_nan=True)


@every
def test_stays_on_the_device(name, pair):
    assert evaluate(name, *(m.to("meta") for m in pair)).device.type == "meta"


@every
def test_never_waits_for_the_device(name, pair):
    evaluate(name, *pair)  # what a Gaussian matrix gives is a table, filled once per shape
    with Waits("cpu") as waits:
        evaluate(name, *pair)

    assert waits.seen == {}


def test_waits_are_seen():
    with Waits("cpu") as waits:
        torch.ones(()).item()

    assert waits.seen == {"_local_scalar_dense": 1}


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("shape", [(40, 60), (128, 128), (64, 512)])
@pytest.mark.parametrize("name", RANKS)
def test_accuracy_on_float32(name, shape, condition):
    matrix = with_values(geometric(min(shape), condition), shape).float()
    expected = RANKS[name](singular_values(matrix))

    assert_close(evaluate(name, matrix).item(), float(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("name", ["stable_rank", "participation_ratio", "effective_rank_energy"])
def test_accuracy_of_energies_in_float32_work(name, condition):
    """The path of devices without float64: what reads energies keeps five digits."""
    matrix = with_values(geometric(96, condition), (96, 128)).float()
    expected = RANKS[name](singular_values(matrix))

    assert_close(find(name)(svd(matrix, dtype=torch.float32)).item(), float(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("name", ["effective_rank", "nuclear_to_spectral"])
def test_accuracy_of_values_in_float32_work(name, condition):
    """The same for what reads values: up to a fifth high."""
    matrix = with_values(geometric(96, condition), (96, 128)).float()
    expected = RANKS[name](singular_values(matrix))

    assert_close(find(name)(svd(matrix, dtype=torch.float32)).item(), float(expected), rtol=0.2, atol=0)


@pytest.fixture(scope="module")
def chain():
    """3000 random spectra, from flat to steep, some with zeros."""
    steepness = 4 * torch.rand(3000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = (gaussian(3000, 24).abs() ** steepness) * (gaussian(3000, 24, seed=1) > -1)
    spectrum = Spectrum(values.sort(-1, descending=True).values, torch.ones_like(values), (24, 24))
    return {n: find(n)(spectrum) for n in (*RANKS, "numerical_rank")} | {"rank": (spectrum.values > 0).sum(-1).double()}


def nuclear_over_frobenius(chain):
    return (chain["schatten_quasi_norm_1"] / chain["frobenius_norm"]).square()


ORDERED = {
    "stable rank, participation ratio": lambda c: (c["stable_rank"], c["participation_ratio"]),
    "participation ratio, effective rank of energies": lambda c: (c["participation_ratio"], c["effective_rank_energy"]),
    "effective rank of energies, nuclear over Frobenius": lambda c: (
        c["effective_rank_energy"],
        nuclear_over_frobenius(c),
    ),
    "nuclear over Frobenius, effective rank": lambda c: (nuclear_over_frobenius(c), c["effective_rank"]),
    "effective rank, rank": lambda c: (c["effective_rank"], c["rank"]),
    "numerical rank, rank": lambda c: (c["numerical_rank"], c["rank"]),
    "stable rank, nuclear over spectral": lambda c: (c["stable_rank"], c["nuclear_to_spectral"]),
    "nuclear over spectral, nuclear over Frobenius": lambda c: (c["nuclear_to_spectral"], nuclear_over_frobenius(c)),
    "participation ratio, stable rank squared": lambda c: (c["participation_ratio"], c["stable_rank"] ** 2),
    "stable rank, energy rank": lambda c: ((0.9 * c["stable_rank"] - 1e-9).ceil(), c["energy_rank"]),
    "participation ratio, energy rank": lambda c: (0.81 * c["participation_ratio"], c["energy_rank"]),
    "energy rank, rank": lambda c: (c["energy_rank"], (0.9 * c["rank"]).ceil()),
    "energy rank, effective rank of energies": lambda c: (c["energy_rank"], c["effective_rank_energy"] ** 10),
}


@pytest.mark.parametrize("pair", ORDERED)
def test_ordering_chain(pair, chain):
    low, high = ORDERED[pair](chain)

    assert bool((low <= high * (1 + 1e-9)).all())


def test_nuclear_over_frobenius_joins_two_ranks(chain):
    assert_close(nuclear_over_frobenius(chain), chain["nuclear_to_spectral"] ** 2 / chain["stable_rank"])


@pytest.mark.parametrize(
    "name", ["stable_rank", "participation_ratio", "effective_rank", "effective_rank_energy", "nuclear_to_spectral"]
)
def test_kronecker_product_multiplies(name):
    one, other = gaussian(6, 4), gaussian(5, 7, seed=1)

    # The product has eight singular values of 0, and a Gram matrix gives 1e-8 for each of them.
    assert_close(evaluate(name, torch.kron(one, other)), evaluate(name, one) * evaluate(name, other), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "stable_rank",
        "participation_ratio",
        "effective_rank",
        "effective_rank_energy",
        "nuclear_to_spectral",
        "numerical_rank",
    ],
)
def test_copies_along_the_diagonal_multiply(name):
    one = gaussian(6, 4)

    assert_close(evaluate(name, torch.block_diag(one, one, one)), 3 * evaluate(name, one), rtol=1e-9, atol=0)


def test_geometric_spectrum_in_closed_form():
    matrix = with_values(0.8 ** (0.5 * np.arange(150)), (150, 150))
    results = torch.stack([evaluate("stable_rank", matrix), evaluate("participation_ratio", matrix)])

    assert_close(results, torch.tensor([1 / (1 - 0.8), 1.8 / 0.2], dtype=torch.float64), rtol=1e-9, atol=0)


def test_gaussian_participation_ratio_in_closed_form():
    assert_close(
        evaluate("participation_ratio", gaussian(20, 200, 200)).mean().item(), 200 * 200 / 401, rtol=0.02, atol=0
    )


def test_gaussian_stable_rank_near_its_limit():
    assert_close(evaluate("stable_rank", gaussian(20, 200, 200)).mean().item(), 50.0, rtol=0.06, atol=0)


# Of the mean over 40 matrices; what remains are corrections in 1 / K. Ranks that are whole numbers are coarse at 8 x 8.
GAUSSIAN = {(8, 8): 0.12, (8, 64): 0.07, (32, 32): 0.05, (128, 128): 0.03, (64, 256): 0.03, (512, 2048): 0.02}


@pytest.mark.parametrize("shape", GAUSSIAN)
@pytest.mark.parametrize("name", [n for n in names() if n.startswith("relative_")])
def test_gaussian_matrices_are_one_in_relative_form(name, shape):
    matrices = gaussian(3 if max(shape) > 500 else 60, *shape, dtype=torch.float32)

    assert_close(evaluate(name, matrices).mean().item(), 1.0, rtol=0, atol=GAUSSIAN[shape])


def test_every_file_registers_its_own_name():
    files = {path.stem for path in Path(statistics.__file__).parent.glob("*.py")} - {"__init__", "registry"}

    assert files == {n for n, s in REGISTERED.items() if s.function.__module__ == f"{statistics.__name__}.{n}"}


def test_every_statistic_has_an_oracle():
    tested = {path.stem.removeprefix("test_") for path in (Path(__file__).parents[1] / "statistics").glob("test_*.py")}

    assert {n for n, s in REGISTERED.items() if s.function.__module__.startswith(statistics.__name__)} <= tested


@pytest.mark.parametrize("name", REGISTERED)
def test_docstring_states_bounds_and_shows_a_use(name):
    documented = REGISTERED[name].function.__doc__ or ""

    assert {"Returns:", "Examples:"} <= set(documented.split())


@pytest.mark.parametrize("law", [test_batch_is_one_by_one, test_transposing_changes_nothing, test_stays_on_the_device])
def test_a_new_statistic_obeys_the_laws(law, added):
    law("values_above_0.2", (gaussian(3, 24, 16), gaussian(3, 24, 16, seed=1)))
