"""Laws that every registered statistic of a `Scaling` obeys, for free."""

import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.maths.scaling.multifractal import multifractal_spectrum
from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.measuring.metrics import SpectralStatistic
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.sources.weights import Weights
from lightning_lowrank.statistics.registry import REGISTERED, find
from tests import scalings
from tests.dispatch import Waits
from tests.oracles.spectra import generator

NAMES = sorted(name for name, found in REGISTERED.items() if found.takes == (Scaling,))
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def weights():
    return torch.stack([scalings.jittered(64, 96, spread=s, seed=i) for i, s in enumerate((0, 0.05, 0.1))])


def evaluate(name, weights):
    return find(name)(rank_scaling(weights))


def exact(found, expected):
    assert_close(found, expected, rtol=1e-11, atol=1e-12, equal_nan=True)


@every
def test_batch_is_one_by_one(name, weights):
    exact(evaluate(name, weights), torch.stack([evaluate(name, one) for one in weights]))


@every
def test_two_batch_axes(name, weights):
    exact(evaluate(name, weights.expand(2, -1, -1, -1)), evaluate(name, weights).expand(2, -1))


@every
def test_part_of_a_batch(name, weights):
    exact(find(name)(rank_scaling(weights)[1:]), evaluate(name, weights)[1:])


@every
def test_order_of_neurons_changes_nothing(name, weights):
    rows, columns = (torch.randperm(n, generator=generator(i)) for i, n in enumerate(weights.shape[-2:]))

    exact(evaluate(name, weights[:, rows][:, :, columns]), evaluate(name, weights))


@every
@pytest.mark.parametrize("scale", [-1.0, 2.0**-90, 2.0**90])
def test_scale_and_sign_change_nothing(name, scale, weights):
    exact(evaluate(name, scale * weights.float()), evaluate(name, weights.float()))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64])
def test_dtype_of_the_weights_is_widened(name, dtype, weights):
    stored = weights.to(dtype)

    exact(evaluate(name, stored), evaluate(name, stored.abs().double()))


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_no_number_there_only(name, value, weights):
    expected = evaluate(name, weights)
    expected[1] = 0.0 if name == "valid" else torch.nan
    spoilt = weights.clone()
    spoilt[1, 2, 3] = value

    exact(evaluate(name, spoilt), expected)


@every
def test_stays_on_the_device(name, weights):
    assert evaluate(name, weights.to("meta")).device.type == "meta"


@every
def test_never_waits_for_the_device(name, weights):
    with Waits("cpu") as waits:
        evaluate(name, weights)

    assert waits.seen == {}


@every
def test_autocast_changes_nothing(name, weights):
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(name, weights)

    exact(found, evaluate(name, weights))


@every
def test_is_a_metric(name, weights):
    metric = SpectralStatistic(name)
    metric.update(weights)

    exact(metric.compute(), find(name)(multifractal_spectrum(weights)).mean())


@every
def test_is_a_metric_of_any_network(name):
    metric = SpectralStatistic(name)
    metric.update(scalings.uneven())

    exact(metric.compute(), find(name)(scalings.uneven()).mean())


@every
def test_has_no_relative_form(name):
    with pytest.raises(ValueError, match="there is no statistic"):
        find(f"relative_{name}")


@every
def test_sources_of_matrices_do_not_offer_it(name):
    with pytest.raises(ValueError, match="Weights offers"):
        Probe("weight", Weights(), [name])
