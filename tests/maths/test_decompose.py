"""Oracle: each matrix alone, by `svd`, `top` or `moments`, which have their own oracles."""

from importlib import import_module

import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.maths.spectra.sketch import estimate, moments, top
from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics.registry import find
from tests.oracles.spectra import gaussian, generator

module = import_module("lightning_lowrank.maths.spectra.decompose")

ALONE = {"moments": moments, "top": top, "values": svd}


@pytest.fixture
def solver(monkeypatch):
    """The sizes of the batches that went to the eigensolver."""
    batches, solve = [], torch.linalg.eigvalsh

    def counted(symmetric, **options):
        batches.append(tuple(symmetric.shape))
        return solve(symmetric, **options)

    monkeypatch.setattr(torch.linalg, "eigvalsh", counted)
    return batches


def matrices():
    return [
        gaussian(*shape, seed=i, dtype=torch.float32)
        for i, shape in enumerate([(6, 9), (4, 5), (20, 6), (2, 3, 6, 6), (5, 4), (1, 6, 7)])
    ]


@pytest.mark.parametrize("needs", ALONE)
def test_each_as_alone(needs):
    found = decompose(matrices(), needs).spectra

    for matrix, spectrum in zip(matrices(), found, strict=True):
        assert_close(spectrum.values, ALONE[needs](matrix).values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needs", ALONE)
def test_keeps_batch_axes_and_shapes(needs):
    found = decompose(matrices(), needs).spectra

    assert [(s.shape, s.values.shape[:-1]) for s in found] == [(tuple(m.shape[-2:]), m.shape[:-2]) for m in matrices()]


@pytest.mark.parametrize("needs", ALONE)
def test_whole_only_with_all_values(needs):
    assert {s.whole for s in decompose(matrices(), needs).spectra} == {needs == "values"}


def test_one_call_per_short_side(solver):
    solved = decompose(matrices(), "values")

    assert (solved.num_solves, sorted(solver)) == (2, [(2, 4, 4), (9, 6, 6)])


@pytest.mark.parametrize("short", [127, 128, 129, 300])
def test_half_of_the_products_makes_the_same_spectrum(short):
    matrices = [gaussian(short, 400), gaussian(2, 700, short), gaussian(short, short)]
    found = [spectrum.values for spectrum in decompose(matrices, "values").spectra]

    for values, matrix in zip(found, matrices, strict=True):
        assert_close(values, torch.linalg.svdvals(matrix), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("needs", ["moments", "top"])
def test_no_eigensolver_for_summaries(needs):
    assert decompose(matrices(), needs).num_solves == 0


def test_workspace_is_bounded(solver, monkeypatch):
    monkeypatch.setattr(module, "WORKSPACE", 8 * 36 * 3)
    decompose([gaussian(6, 7, seed=i) for i in range(10)], "values")

    assert max(shape[0] for shape in solver) <= 4


@pytest.mark.parametrize("needs", ALONE)
def test_one_that_fails_does_not_harm_the_others(needs):
    odd = [gaussian(6, 9).to_sparse(), torch.full((6, 9), torch.nan), torch.full((6, 6), torch.inf)]
    found = decompose([*odd, *matrices()], needs).spectra

    assert [bool(s.values.isnan().any()) for s in found] == [True] * 3 + [False] * len(matrices())


@pytest.mark.parametrize("needs", ALONE)
def test_a_failure_of_the_batch_is_taken_apart(needs, monkeypatch):
    grams = module.short_grams

    def out_of_memory(batch, dtype, **options):
        if len(batch) > 1 or batch[0].shape == (20, 6):
            raise torch.OutOfMemoryError
        return grams(batch, dtype, **options)

    monkeypatch.setattr(module, "short_grams", out_of_memory)
    found = decompose(matrices(), needs).spectra

    assert [bool(s.values.isnan().any()) for s in found] == [m.shape == (20, 6) for m in matrices()]


@pytest.mark.parametrize("needs", ALONE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.complex64])
def test_dtypes_side_by_side(needs, dtype):
    matrix = (2 * gaussian(6, 9)).to(dtype)
    found = decompose([gaussian(6, 8, dtype=torch.float32), matrix], needs).spectra[1]
    wide = matrix.to(torch.complex128 if dtype.is_complex else torch.float64)

    assert_close(found.energy, wide.abs().square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("needs", ALONE)
def test_empty_matrices_and_none_at_all(needs):
    empty = decompose([torch.zeros(0, 3), torch.zeros(2, 3, 0)], needs)

    assert [s.values.tolist() for s in empty.spectra] == [[0.0], [[0.0], [0.0]]]


def test_nothing_to_decompose():
    assert decompose([], "values").spectra == []


@pytest.mark.parametrize("needs", ALONE)
@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_any_scale(needs, scale):
    found = decompose([gaussian(6, 8), scale * gaussian(6, 9)], needs).spectra[1]

    assert_close(found.top / scale, ALONE[needs](gaussian(6, 9)).top, rtol=1e-5, atol=0)


@pytest.mark.parametrize("needs", ALONE)
def test_stays_on_the_device(needs):
    assert decompose([torch.zeros(6, 9, device="meta")], needs).spectra[0].values.device.type == "meta"


def test_large_matrices_are_sketched():
    solved = decompose([gaussian(60, 70), gaussian(20, 70)], "values", sketch_above=50, generator=generator())

    assert [s.num_probes > 0 for s in solved.spectra] == [True, False]


def test_sketches_follow_the_generator():
    matrix = gaussian(60, 70)
    one, other = (
        decompose([matrix], "values", sketch_above=50, generator=generator(5)).spectra[0].values for _ in range(2)
    )

    assert torch.equal(one, other)


def test_a_sketch_does_not_meet_the_draws_of_its_matrix():
    """A matrix drawn with the seed of the sketch: unmixed, the probes would be its own rows."""
    matrix = torch.randn(400, 400, generator=generator(0))
    estimated = decompose([matrix], "values", sketch_above=50, generator=generator(0)).spectra[0]
    value, error = estimate(find("effective_rank_energy"), estimated)

    assert abs(value - find("effective_rank_energy")(svd(matrix))) <= error


def test_a_sketch_does_not_depend_on_its_company():
    matrix, other = gaussian(60, 70), gaussian(55, 70)
    alone, together = (
        decompose(given, "values", sketch_above=50).spectra[-1].values for given in ([matrix], [other, matrix])
    )

    assert torch.equal(alone, together)


def test_inputs_stay_as_they_are():
    given = matrices()
    for needs in ALONE:
        decompose(given, needs)

    assert all(torch.equal(one, other) for one, other in zip(given, matrices(), strict=True))
