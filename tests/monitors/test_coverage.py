"""Of every number that has an error the truth is within one error in two of three trials, within two in nine of ten.

Oracles: dense matrices of `benchmarks.coverage`, and the known eigenvalues of what is multiplied with.
"""

import pytest

from benchmarks.coverage import ONE, SETUPS, TWO, Coverage, coverage

# Counts of trials: with more, and with few that still see what is wrong by a factor of two.
MANY, FEW = 200, 12


def short(found: dict[str, Coverage], *, slack: float) -> dict[str, tuple[float, float]]:
    """Quantities that are within their errors less often than is asked for, less the slack of so few trials."""
    return {
        name: (of_name.one, of_name.two)
        for name, of_name in found.items()
        if of_name.one < ONE - slack or of_name.two < TWO - slack
    }


@pytest.mark.evidence
@pytest.mark.parametrize("setup", SETUPS)
def test_truth_is_within_the_errors_of_every_estimated_number(setup: str) -> None:
    """Two standard deviations of a share of nine tenths are the slack."""
    assert not short(coverage(setup, range(MANY)), slack=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("setup", [name for name in SETUPS if name.startswith(("Curv", "NTKMonitor, class"))])
def test_truth_is_within_the_errors_of_a_few_networks(setup: str) -> None:
    """With so few trials the slack is large, and what has hardly an error, or none, still shows."""
    assert not short(coverage(setup, range(FEW)), slack=0.3)
