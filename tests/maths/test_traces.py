"""Oracles: operators whose eigenvalues are known by construction, their blocks read from the matrix, and many seeds for
what is random.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from lightning_lowrank import statistics
from lightning_lowrank.maths.operators import traces
from lightning_lowrank.maths.operators.eigenspaces import top_eigenpairs
from lightning_lowrank.maths.operators.estimates import student
from lightning_lowrank.maths.operators.operators import Layout, Operator
from lightning_lowrank.maths.operators.traces import (
    density,
    exact_spectrum,
    negative_mass,
    random_signs,
    spectral_estimate,
    trace,
)
from lightning_lowrank.maths.spectra.sketch import estimate
from lightning_lowrank.maths.spectra.spectrum import pooled
from tests.dispatch import Waits
from tests.operators import SPECTRA, with_spectrum
from tests.oracles.spectra import gaussian, generator

SIZE, SEEDS, PROBES = 60, 200, 5
POSITIVE = [20.0, 12.0, *np.linspace(0, 1, SIZE - 2)]
INDEFINITE = [20.0, -12.0, *np.linspace(-1, 2, SIZE - 2)]
LAYOUT = Layout.of({"a": torch.zeros(4, 5), "b": torch.zeros(40)})


def operator_of(values, **options):
    """It and its matrix."""
    operator, vectors = with_spectrum(values, size=len(values), dtype=torch.float64, **options)
    return operator, vectors.T @ (torch.as_tensor(values, dtype=torch.float64)[:, None] * vectors)


def known(operator, num_products=5):
    """Pairs, of which some have not converged."""
    return top_eigenpairs(operator, 2, lowest=1, num_products=num_products, generator=generator(9))


def estimates(values, pairs):
    """One per seed: probes are independent, so that many of them are many estimates."""
    operator, _ = operator_of(values)
    found = spectral_estimate(
        operator, random_signs(operator, PROBES * SEEDS, generator(4)), known=pairs, steps=2, layout=LAYOUT
    )
    parts = [slice(first, first + PROBES) for first in range(0, PROBES * SEEDS, PROBES)]
    return [
        replace(
            found,
            spectrum=some_of(found.spectrum, p),
            layer_traces=found.layer_traces[p],
            layer_squares=found.layer_squares[p],
            images=found.images[p],
        )
        for p in parts
    ]


def some_of(spectrum, probes):
    return replace(
        spectrum, values=spectrum.values[probes], weights=spectrum.weights[probes], num_probes=PROBES, coarse=None
    )


def off(samples, expected):
    """How far the mean of the samples is from what is expected, in its standard errors."""
    samples = torch.stack(samples)
    return ((samples.mean(0) - expected).abs() / (samples.std(0) / len(samples) ** 0.5)).max()


def participation(values):
    return np.abs(values).sum() ** 2 / np.square(values).sum()


every_case = pytest.mark.parametrize(
    ("values", "deflated"), [(POSITIVE, False), (POSITIVE, True), (INDEFINITE, False), (INDEFINITE, True)]
)


@pytest.fixture(scope="module")
def drawn():
    """Estimates of each case, made once."""
    made = {}

    def of(values, deflated):
        if (id(values), deflated) not in made:
            made[id(values), deflated] = estimates(values, known(operator_of(values)[0]) if deflated else None)
        return made[id(values), deflated]

    return of


@every_case
def test_the_trace_is_unbiased(values, deflated, drawn):
    assert off([traces.debiased(trace, e.spectrum).value for e in drawn(values, deflated)], sum(values)) < 4


@every_case
def test_the_trace_of_the_square_is_unbiased(values, deflated, drawn):
    assert off([traces.trace_of_square(e).value for e in drawn(values, deflated)], np.square(values).sum()) < 4


@every_case
def test_traces_of_layers_are_unbiased(values, deflated, drawn):
    _, matrix = operator_of(values)
    expected = torch.stack([matrix[:20, :20].trace(), matrix[20:, 20:].trace()])

    assert off([e.layer_traces.mean(0) for e in drawn(values, deflated)], expected) < 4


@every_case
def test_squared_norms_of_layers_are_unbiased(values, deflated, drawn):
    _, matrix = operator_of(values)
    expected = torch.stack([matrix[:20].square().sum(), matrix[20:].square().sum()])

    assert off([e.layer_squares.mean(0) for e in drawn(values, deflated)], expected) < 4


@pytest.mark.parametrize("deflated", [False, True])
def test_the_participation_ratio_of_a_positive_operator_is_unbiased(deflated, drawn):
    found = [traces.participation_ratio(e).value for e in drawn(POSITIVE, deflated)]

    assert off(found, participation(POSITIVE)) < 4


def test_the_participation_ratio_without_its_correction_is_biased(drawn):
    """What guards the test above."""
    found = [statistics.participation_ratio(e.spectrum) for e in drawn(POSITIVE, False)]

    assert off(found, participation(POSITIVE)) > 4


def test_the_square_of_what_is_known_in_part_takes_what_couples_it_to_the_rest():
    """Three products for three pairs, none of which has converged; without the coupling the sum is too small."""
    pairs = known(operator_of(POSITIVE)[0], 3)
    found, expected = estimates(POSITIVE, pairs), np.square(POSITIVE).sum()

    assert off([traces.trace_of_square(e).value for e in found], expected) < 4
    assert off([traces.trace_of_square(e).value - e.coupling for e in found], expected) > 4


@every_case
def test_errors_are_students_factor_times_what_the_estimates_vary_by(values, deflated, drawn):
    found = [traces.debiased(trace, e.spectrum) for e in drawn(values, deflated)]
    spread = torch.stack([e.value for e in found]).std() * stats.t.ppf(0.975, PROBES - 1) / 2

    assert_close(torch.stack([e.error.square() for e in found]).mean().sqrt(), spread, rtol=0.15, atol=0)


@pytest.mark.parametrize("values", [POSITIVE, INDEFINITE])
def test_truth_is_within_one_error_in_two_of_three_trials_and_within_two_in_nine_of_ten(values, drawn):
    """With the strongest directions known, as monitors have them: a sum that hangs on two of sixty is not normal."""
    of_trace = [traces.debiased(trace, e.spectrum) for e in drawn(values, True)]
    of_square = [traces.trace_of_square(e) for e in drawn(values, True)]

    for found, truth in ((of_trace, sum(values)), (of_square, np.square(values).sum())):
        off = torch.stack([(e.value - truth).abs() / e.error for e in found])
        # Three standard deviations of a share of 200 below what it should be.
        assert (off <= 1).double().mean() > 0.683 - 0.1
        assert (off <= 2).double().mean() > 0.9 - 0.065


@pytest.mark.parametrize("num", [4, 5, 16])
def test_students_factors_are_those_of_his_distribution(num):
    assert student(num) == pytest.approx(stats.t.ppf(0.975, num - 1) / 2, rel=1e-2)


@pytest.mark.parametrize("name", ["effective_rank_energy", "energy_rank"])
def test_an_error_holds_what_half_of_the_steps_would_have_said(name):
    """Eight steps are too few for an indefinite operator: the rank is far off, and the error says so."""
    values = [*10.0 * 0.97 ** np.arange(200), *-(5.0 * 0.97 ** np.arange(100))]
    operator, _ = operator_of(values)
    statistic = statistics.find(name)
    found = spectral_estimate(operator, random_signs(operator, 60, generator()), steps=8)
    result = traces.debiased(statistic, found.spectrum)
    blind = traces.debiased(statistic, replace(found.spectrum, coarse=None))
    off = (result.value - statistic(exact_spectrum(operator))).abs()

    assert off > 3 * blind.error
    assert off < 2 * result.error


@pytest.mark.parametrize("values", [POSITIVE, INDEFINITE])
def test_what_is_known_takes_variance_away(values, drawn):
    plain, deflated = (torch.stack([trace(e.spectrum) for e in drawn(values, known)]).std() for known in (False, True))

    assert deflated < 0.3 * plain


def test_the_negative_mass_takes_forty_steps():
    bulk = gaussian(300).numpy()
    operator, _ = with_spectrum([30.0, -10.0, *bulk], size=302, dtype=torch.float64)
    found = spectral_estimate(operator, random_signs(operator, 4, generator()), known=known(operator, 20), steps=40)
    values = np.array([30.0, -10.0, *bulk])
    result = traces.debiased(negative_mass, found.spectrum)

    assert_close(result.value.item(), -values[values < 0].sum() / np.abs(values).sum(), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["zero", "rank 1", "rank 3", "identity", "clustered"])
def test_sums_over_known_spectra(name):
    """Where the Krylov space is exhausted nothing is NaN; the rest after the known pairs is 0 or nearly so, and the
    sums are close.
    """
    operator, _ = with_spectrum(SPECTRA[name])
    pairs = top_eigenpairs(operator, 3, lowest=1, num_products=12, generator=generator())
    found = spectral_estimate(operator, random_signs(operator, 4, generator(1)), known=pairs, steps=10)
    sums = [float(np.sum(SPECTRA[name])), float(np.sum(np.square(SPECTRA[name])))]

    assert_close([trace(found.spectrum).item(), traces.trace_of_square(found).value.item()], sums, rtol=0.05, atol=1e-5)


def test_the_zero_operator_has_no_participation_and_no_negative_mass():
    operator, _ = with_spectrum([])
    found = spectral_estimate(operator, random_signs(operator, 2, generator()), steps=4)

    assert (traces.participation_ratio(found).value, negative_mass(found.spectrum)) == (0, 0)


@pytest.mark.parametrize("name", ["participation_ratio", "effective_rank_energy", "energy_rank"])
def test_statistics_of_energies_take_signed_spectra(name):
    """As if the eigenvalues were their magnitudes."""
    operator, _ = operator_of(INDEFINITE)
    positive, _ = operator_of(np.abs(INDEFINITE))
    statistic = statistics.find(name)

    assert_close(statistic(exact_spectrum(operator)), statistic(exact_spectrum(positive)))


@pytest.mark.parametrize("name", ["participation_ratio", "effective_rank_energy", "energy_rank"])
def test_statistics_of_energies_are_estimated_within_their_error(name):
    operator, _ = operator_of(INDEFINITE)
    found = spectral_estimate(operator, random_signs(operator, 6, generator()), known=known(operator, 12), steps=30)
    statistic = statistics.find(name)
    value, error = estimate(statistic, found.spectrum)

    assert (value - statistic(exact_spectrum(operator))).abs() <= error


def test_the_exact_spectrum_has_the_signed_roots_of_the_eigenvalues():
    operator, _ = operator_of(INDEFINITE)
    expected = np.sort(np.sign(INDEFINITE) * np.sqrt(np.abs(INDEFINITE)))

    assert_close(exact_spectrum(operator).values.sort().values, torch.from_numpy(expected))


def test_an_exact_spectrum_has_no_error():
    operator, _ = operator_of(INDEFINITE)
    found = traces.debiased(trace, exact_spectrum(operator))

    assert_close((found.value.item(), found.error.item()), (sum(INDEFINITE), 0.0))


def test_weights_add_up_to_the_size():
    operator, _ = with_spectrum(SPECTRA["clustered"])
    found = spectral_estimate(operator, random_signs(operator, 3, generator()), steps=10)

    assert_close(found.spectrum.weights.sum(-1), torch.full((3,), 500.0, dtype=torch.float64), rtol=1e-5, atol=0)


def test_an_estimate_without_an_error_is_refused():
    operator, _ = with_spectrum([1.0])

    with pytest.raises(ValueError, match="at least 2 probes, not 1"):
        spectral_estimate(operator, random_signs(operator, 1, generator()), steps=3)


def test_an_operator_that_is_not_finite_gives_nan():
    operator = Operator(9, lambda v: v * torch.nan, torch.device("cpu"), torch.float32)
    found = spectral_estimate(operator, random_signs(operator, 2, generator()), steps=3)

    assert trace(found.spectrum).isnan()
    assert traces.participation_ratio(found).value.isnan()


def test_nothing_waits_for_the_device():
    operator, _ = with_spectrum(SPECTRA["clustered"])
    pairs, draws = top_eigenpairs(operator, 3, num_products=6, generator=generator()), generator()
    with Waits("cpu") as waits:
        found = spectral_estimate(
            operator, random_signs(operator, 2, draws), known=pairs, steps=4, layout=Layout.of({"a": torch.zeros(500)})
        )
        traces.participation_ratio(found)
        density(found.spectrum)

    assert waits.seen.keys() <= {"lift_fresh"}


def test_the_density_integrates_to_one():
    operator, _ = operator_of(INDEFINITE)
    found = density(spectral_estimate(operator, random_signs(operator, 3, generator()), steps=20).spectrum)

    assert_close((found.curve.sum() * (found.grid[1] - found.grid[0])).item(), 1.0, rtol=0.01, atol=0)


def test_the_density_is_that_of_the_eigenvalues():
    operator, _ = operator_of(INDEFINITE)
    found = density(exact_spectrum(operator), width=0.02)
    sigma = 0.02 * (max(INDEFINITE) - min(INDEFINITE))
    grid = found.grid.numpy()
    expected = np.mean(
        [np.exp(-((grid - v) ** 2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi)) for v in INDEFINITE], 0
    )

    assert_close(found.curve, torch.from_numpy(expected), rtol=1e-6, atol=1e-9)


def test_cells_count_eigenvalues():
    operator, _ = operator_of(INDEFINITE)
    found = density(exact_spectrum(operator))
    half = (found.grid[1] - found.grid[0]).item() / 2
    edges = np.append(found.grid.numpy() - half, found.grid[-1].item() + half)

    assert_close(found.counts, torch.from_numpy(np.histogram(INDEFINITE, edges)[0].astype(float)))


def test_the_density_of_many_probes_is_near_the_truth():
    operator, _ = operator_of(INDEFINITE)
    exact = density(exact_spectrum(operator), width=0.05)
    found = density(
        spectral_estimate(
            operator, random_signs(operator, 8, generator()), known=known(operator, 12), steps=30
        ).spectrum,
        width=0.05,
    )

    assert (found.curve - exact.curve).abs().max() < 0.1 * exact.curve.max()


def test_an_estimate_pools_its_probes():
    operator, _ = operator_of(POSITIVE)
    found = spectral_estimate(operator, random_signs(operator, 3, generator()), steps=10)

    assert_close(pooled(found.spectrum).weights.sum(), torch.tensor(float(SIZE), dtype=torch.float64))
