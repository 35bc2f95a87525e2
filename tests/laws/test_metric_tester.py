"""What torchmetrics' own `MetricTester` (in the tests of its repository, not in the wheel) asks of every metric."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchmetrics import MetricCollection

from lightning_lowrank import SpectralStatistic, svd
from lightning_lowrank.statistics import find

NAMES = ["stable_rank", "energy_rank_0.01", "relative_effective_rank", "spectral_norm"]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 6, 9, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("name", NAMES)
def test_forward_gives_the_batch_and_compute_the_mean_of_all(name: str) -> None:
    metric, statistic = SpectralStatistic(name), find(name)
    for batch in batches():
        assert_close(metric(batch), statistic(svd(batch)).mean())

    assert_close(metric.compute(), torch.cat([statistic(svd(batch)) for batch in batches()]).mean())


@pytest.mark.filterwarnings("ignore:This property will be removed:DeprecationWarning")  # of torchmetrics' own
@pytest.mark.parametrize("name", NAMES)
def test_a_metric_is_scripted_alone_and_in_a_module(name: str) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.metric = SpectralStatistic(name)
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    holder = Holder()

    assert_close(torch.jit.script(holder)(torch.ones(1, 3)), holder(torch.ones(1, 3)))
    torch.jit.script(SpectralStatistic(name))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_differentiable(name: str) -> None:
    metric = SpectralStatistic(name)
    batch = batches()[0].requires_grad_()

    assert not metric(batch).requires_grad
    assert not metric.compute().requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_matrices_in_other_precisions_are_taken(dtype: torch.dtype) -> None:
    metric, expected = SpectralStatistic("stable_rank"), SpectralStatistic("stable_rank")
    for batch in batches():
        metric.update(batch.to(dtype))
        expected.update(batch.to(dtype).double())

    assert_close(metric.compute(), expected.compute(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_metric_goes_on(name: str) -> None:
    metric = SpectralStatistic(name)
    metric.update(batches()[0])
    other = pickle.loads(pickle.dumps(metric))
    for one in (metric, other):
        one.update(batches()[1])

    assert_close(other.compute(), metric.compute())


def test_a_collection_feeds_each_of_its_metrics() -> None:
    collection = MetricCollection({f"{i}": SpectralStatistic(name) for i, name in enumerate(NAMES)})
    collection.update(batches()[0])
    found: dict[str, Any] = collection.compute()

    assert_close(found, {f"{i}": find(name)(svd(batches()[0])).mean() for i, name in enumerate(NAMES)})


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(())])
def test_what_is_no_matrix_is_refused_in_words(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"stable_rank needs matrices \[\.\.\., rows, columns\]"):
        SpectralStatistic("stable_rank").update(wrong)
