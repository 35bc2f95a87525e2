"""Oracle: the fit of Clauset, Shalizi and Newman (2009), as a loop over where the tail may begin, in numpy."""

from importlib import import_module

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.spectra.spectrum import svd
from lightning_lowrank.statistics import tail_exponent, tail_exponent_fit
from tests.oracles.power_law import clauset
from tests.oracles.spectra import gaussian, singular_values, with_values


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(30, 20), (64, 256), (10, 10)])
def test_matches_a_loop(shape, seed):
    matrix = gaussian(*shape, seed=seed)

    assert_close(tail_exponent(svd(matrix)).item(), clauset(singular_values(matrix) ** 2)[1], rtol=1e-8, atol=0)


def test_values_of_zero_are_left_out():
    matrix = torch.nn.functional.pad(gaussian(40, 30), (0, 10))

    assert_close(tail_exponent(svd(matrix)), tail_exponent(svd(matrix[:, :30])))


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_finds_the_exponent_of_a_power_law(alpha):
    uniform = (np.arange(400) + 0.5) / 400
    matrix = with_values(uniform ** (-0.5 / (alpha - 1)), (400, 400))

    assert_close(tail_exponent(svd(matrix)).item(), alpha, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "matrix", [torch.eye(50), torch.zeros(50, 50), gaussian(9, 9), gaussian(50, 3) @ gaussian(3, 50)]
)
def test_is_nan_without_a_tail(matrix):
    assert torch.isnan(torch.stack([tail_exponent(svd(matrix)), tail_exponent_fit(svd(matrix))])).all()


def test_in_pieces_as_in_one(monkeypatch):
    spectrum = svd(gaussian(3, 40, 30))
    expected = tail_exponent(spectrum)
    monkeypatch.setattr(import_module("lightning_lowrank.statistics.tail_exponent"), "WORKSPACE", 200)

    assert_close(tail_exponent(spectrum), expected)
