"""Finding statistics by name, and adding one."""

import pickle

import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank import statistics
from lightning_lowrank.maths.spectra.spectrum import Spectrum, svd
from lightning_lowrank.maths.spectra.subspaces import Subspace
from lightning_lowrank.statistics.registry import available, find, statistic
from tests.catalogue import names
from tests.oracles.spectra import gaussian


@pytest.mark.parametrize("name", ["values_above", "values_above_0.2", "relative_values_above_0.2"])
def test_a_new_file_is_all_it_takes(name, added):
    assert find(name).name == name


def test_a_new_statistic_is_under_the_laws(added):
    assert {"values_above", "relative_values_above"} <= set(names())


def test_parameter_stands_in_the_name():
    matrix = gaussian(20, 30)

    assert_close(find("energy_rank_0.01")(svd(matrix)), statistics.energy_rank(svd(matrix), epsilon=0.01))


def test_parameter_in_scientific_notation():
    matrix = gaussian(20, 30)

    assert_close(find("energy_rank_1e-3")(svd(matrix)), statistics.energy_rank(svd(matrix), epsilon=1e-3))


@pytest.mark.parametrize(
    "name", ["stable_rnak", "relative_frobenius_norm", "relative_subspace_overlap", "", "rank_0.1"]
)
def test_unknown_names_list_what_there_is(name):
    with pytest.raises(ValueError, match="stable_rank"):
        find(name)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'stable_rank'"):
        find("stable_rnak")


@pytest.mark.parametrize("name", ["energy_rank_0", "energy_rank_1.5", "schatten_quasi_norm_2.5", "stable_rank_2"])
def test_parameters_outside_of_the_domain_are_refused(name):
    with pytest.raises(ValueError, match="takes"):
        find(name)


def test_tail_depends_on_the_parameter():
    assert [find(f"schatten_quasi_norm{p}").tail for p in ("", "_0.5", "_1", "_2")] == [True, True, False, False]


@pytest.mark.parametrize(
    "name", ["numerical_rank", "schatten_quasi_norm_0.5", "tail_exponent", "marchenko_pastur_outliers"]
)
def test_tail_is_nan_on_spectra_that_are_not_whole(name):
    estimate = Spectrum(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 30.0]), (31, 31), whole=False)

    assert torch.isnan(find(name)(estimate))


def test_probes_of_an_estimate_are_pooled():
    probes = Spectrum(
        torch.tensor([[2.0, 1.0], [2.0, 0.5]]),
        torch.tensor([[1.0, 8.0], [1.0, 16.0]]),
        (9, 9),
        whole=False,
        num_probes=2,
    )
    expected = statistics.participation_ratio(
        Spectrum(torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 4.0, 8.0]), (9, 9))
    )

    assert_close(statistics.participation_ratio(probes), expected)


@pytest.mark.parametrize(
    ("name", "takes"),
    [("stable_rank", (Spectrum,)), ("weight_ratio", (Spectrum, Spectrum)), ("subspace_overlap", (Subspace, Subspace))],
)
def test_takes_is_read_from_the_signature(name, takes):
    assert find(name).takes == takes


@pytest.mark.parametrize("name", ["stable_rank", "energy_rank_0.01", "relative_energy_rank_0.01"])
def test_found_statistics_can_be_pickled(name):
    spectrum = svd(gaussian(20, 30))

    assert_close(pickle.loads(pickle.dumps(find(name)))(spectrum), find(name)(spectrum))


def test_counts_move_by_one():
    assert [find(name).step((8, 8)) for name in ("energy_rank", "energy_rank_0.01", "stable_rank")] == [1.0, 1.0, 0.0]


def test_relative_counts_move_by_one_over_the_null():
    matrix = gaussian(8, 8)
    expected = find("relative_energy_rank")(svd(matrix)) / find("energy_rank")(svd(matrix))

    assert_close(find("relative_energy_rank").step((8, 8)), expected.item())


def test_a_name_is_taken_once():
    def stable_rank(spectrum: Spectrum):
        return spectrum.top

    with pytest.raises(ValueError, match="already"):
        statistic(unit="1")(stable_rank)


def test_relative_form_of_an_empty_matrix_is_not_defined():
    assert torch.isnan(find("relative_stable_rank")(svd(torch.zeros(0, 3))))


def test_available_is_sorted():
    assert available() == sorted(set(available()))


def test_a_default_device_of_the_user_does_not_reach_in():
    """What Gaussian matrices give is computed on the CPU, also under a default device of the user's."""
    with torch.device("meta"):
        result = find("relative_stable_rank")(svd(torch.ones(7, 11, device="cpu")))

    assert_close(result, find("relative_stable_rank")(svd(torch.ones(7, 11))))
