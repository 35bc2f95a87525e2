"""Every statistic as a torchmetric, for free, and the metrics that pool rows and sites."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchmetrics import MetricCollection

from lightning_lowrank import Gram, SiteMeans, SpectralStatistic
from lightning_lowrank.maths.spectra.spectrum import Spectrum, svd
from lightning_lowrank.maths.spectra.subspaces import top_subspace
from lightning_lowrank.measuring.metrics import state_dtype
from lightning_lowrank.statistics.registry import find
from tests.catalogue import names
from tests.oracles.spectra import RANKS, gaussian, singular_values

SINGLE = [name for name in names() if len(find(name).takes) == 1]
PAIRS = [name for name in names() if len(find(name).takes) == 2]

# What a class does it does for all: one plain, one with a parameter, one relative, one of a pair of subspaces.
KINDS = ("stable_rank", "energy_rank_0.01", "relative_effective_rank", "subspace_overlap")
every = pytest.mark.parametrize("name", KINDS)


def batches(name: str, count: int = 3, *, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, ...]]:
    """Arguments of `count` updates: of a pair two batches; of different sizes, so that a mean of means would be another
    number.
    """
    steep = torch.diag(torch.logspace(0, -2, 16, dtype=torch.float64))
    return [
        tuple((gaussian(i + 1, 24, 16, seed=10 * i + j) @ steep).to(dtype) for j in range(len(find(name).takes)))
        for i in range(count)
    ]


def value(name: str, matrices: tuple[Tensor, ...]) -> Tensor:
    """The statistic itself, of a batch."""
    found = find(name)
    return found(
        *(svd(m) if kind is Spectrum else top_subspace(m, 8) for kind, m in zip(found.takes, matrices, strict=True))
    )


def filled(name: str, count: int = 3, **options: Any) -> SpectralStatistic:
    """A metric that has seen that many batches."""
    metric = SpectralStatistic(name, **options)
    for matrices in batches(name, count):
        metric.update(*matrices)
    return metric


def key(name: str) -> str:
    """A name for a collection's dict: torch allows no dot in it."""
    return name.replace(".", "_")


def collected(kind: list[str]) -> MetricCollection:
    """A user's collection of these."""
    return MetricCollection({key(name): SpectralStatistic(name) for name in kind})


def same(result: Any, expected: Any) -> None:
    assert_close(result, expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", names())
def test_computes_the_mean_of_single_values(name: str) -> None:
    expected = torch.cat([value(name, matrices) for matrices in batches(name)]).mean()

    same(filled(name).compute(), expected)


@pytest.mark.parametrize("name", RANKS)
def test_computes_the_mean_of_values_by_numpy(name: str) -> None:
    expected = np.mean([RANKS[name](singular_values(m)) for batch, *_ in batches(name) for m in batch])

    assert_close(filled(name).compute().item(), float(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", names())
def test_gives_a_number_on_ordinary_matrices(name: str) -> None:
    assert torch.isfinite(filled(name).compute())


@every
def test_reset_forgets(name: str) -> None:
    metric = filled(name)
    metric.reset()
    metric.update(*batches(name, 1)[0])

    same(metric.compute(), filled(name, 1).compute())


@every
def test_forward_gives_the_batch_and_adds_to_the_whole(name: str) -> None:
    metric = SpectralStatistic(name)
    seen = [metric(*matrices) for matrices in batches(name)]

    same(torch.stack(seen), torch.stack([value(name, matrices).mean() for matrices in batches(name)]))
    same(metric.compute(), filled(name).compute())


@every
def test_pickles_with_what_it_has_seen(name: str) -> None:
    metric = pickle.loads(pickle.dumps(filled(name, 2)))
    metric.update(*batches(name)[2])

    same(metric.compute(), filled(name).compute())


@every
def test_state_dict_goes_into_another(name: str) -> None:
    metric, other = filled(name, 2), SpectralStatistic(name)
    metric.persistent(True)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(*batches(name)[2])

    same(other.compute(), filled(name).compute())


@every
def test_state_is_left_out_of_checkpoints_unless_asked_for(name: str) -> None:
    assert not filled(name).state_dict()


@every
def test_clone_goes_its_own_way(name: str) -> None:
    metric = filled(name, 2)
    metric.clone().update(*batches(name)[2])

    same(metric.compute(), filled(name, 2).compute())


@every
def test_merging_is_seeing_both(name: str) -> None:
    metric, other = filled(name, 2), SpectralStatistic(name)
    other.update(*batches(name)[2])
    metric.merge_state(other)

    same(metric.compute(), filled(name).compute())


@every
def test_keeps_no_graph(name: str) -> None:
    metric = SpectralStatistic(name)
    metric.update(*(m.requires_grad_() for m in batches(name, 1)[0]))

    assert not metric.compute().requires_grad


@every
def test_autocast_changes_nothing(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        metric = filled(name)

    assert_close(metric.compute(), filled(name).compute(), rtol=0, atol=0, equal_nan=True)


@every
def test_stays_on_its_device(name: str) -> None:
    metric = SpectralStatistic(name).to("meta")
    metric.update(*(m.to("meta") for m in batches(name, 1)[0]))

    assert metric.compute().device.type == "meta"


@every
def test_half_precision_of_a_module_does_not_round_it(name: str) -> None:
    same(filled(name).half().compute(), filled(name).compute())


def test_each_kind_of_statistic_has_a_representative() -> None:
    assert set(KINDS) <= set(names())
    assert [len(find(name).takes) for name in KINDS] == [1, 1, 1, 2]


@pytest.mark.parametrize("kind", [SINGLE, PAIRS], ids=["one batch", "two batches"])
def test_collection_gives_what_each_gives_alone(kind: list[str]) -> None:
    collection = collected(kind)
    for matrices in batches(kind[0]):
        collection.update(*matrices)

    same(collection.compute(), {key(name): filled(name).compute() for name in kind})


def test_collection_tells_statistics_apart_that_begin_alike() -> None:
    """A MetricCollection updates one of several metrics whose states are equal after the first batch: all ranks of the
    identity are.
    """
    ranks = [name for name in SINGLE if find(name).unit == "directions"]
    collection = collected(ranks)
    collection.update(torch.eye(16))
    collection.update(batches("stable_rank", 1)[0][0])

    expected = {key(name): (value(name, (torch.eye(16),)) + value(name, batches(name, 1)[0])[0]) / 2 for name in ranks}
    same(collection.compute(), expected)


def test_collection_tells_sizes_of_subspaces_apart() -> None:
    collection = MetricCollection({str(k): SpectralStatistic("subspace_overlap", k=k) for k in (2, 4)})
    same_twice, other = gaussian(1, 8, 8), gaussian(1, 8, 8, seed=1)
    collection.update(same_twice, same_twice)
    collection.update(same_twice, other)

    assert collection.compute()["2"] != collection.compute()["4"]


def test_a_pair_takes_two_batches() -> None:
    with pytest.raises(ValueError, match="weight_ratio needs 2 batches of matrices, not 1"):
        SpectralStatistic("weight_ratio").update(torch.eye(2))


def test_an_unknown_statistic_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"'stable_ranks', did you mean 'stable_rank'\?; available: \[.*'effective_rank'"
    ):
        SpectralStatistic("stable_ranks")


def test_a_matrix_that_is_not_finite_makes_the_mean_nan() -> None:
    metric = filled("stable_rank")
    metric.update(torch.full((3, 4), torch.inf))

    assert metric.compute().isnan()


@pytest.fixture
def rows() -> list[Tensor]:
    """Two updates of a Gram of width 6, far from centred, with batch axes."""
    return [gaussian(4, 5, 6) + 3, 2 * gaussian(7, 6, seed=1) - 1]


def pooled(rows: list[Tensor], width: int = 6, **options: Any) -> Gram:
    """A Gram that has seen these."""
    metric = Gram(width, **options)
    for some in rows:
        metric.update(some)
    return metric


def stacked(rows: list[Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """All rows, for numpy."""
    return np.concatenate([np.asarray(some, dtype=np.float64).reshape(-1, some.shape[-1]) for some in rows])


def test_gram_is_that_of_all_rows(rows: list[Tensor]) -> None:
    matrix = stacked(rows)
    gram, total, count = pooled(rows).compute()

    assert_close(gram.numpy(), matrix.T @ matrix)
    assert_close(total.numpy(), matrix.sum(0))
    assert count == len(matrix)


def test_gram_spectrum_is_that_of_all_rows(rows: list[Tensor]) -> None:
    spectrum = pooled(rows).spectrum()

    assert_close(spectrum.values.numpy(), np.linalg.svd(stacked(rows), compute_uv=False))
    assert spectrum.shape == (27, 6)


def test_centred_gram_spectrum_is_that_of_the_covariance(rows: list[Tensor]) -> None:
    scatter = np.cov(stacked(rows), rowvar=False) * (27 - 1)

    assert_close(pooled(rows).spectrum(centred=True).values.numpy(), np.sqrt(np.linalg.eigvalsh(scatter)[::-1]))


def test_gram_has_no_more_values_than_rows() -> None:
    assert pooled([gaussian(2, 6)]).spectrum().values.shape == (2,)


def test_rank_of_pooled_rows_is_not_the_mean_of_ranks() -> None:
    """Rows of one batch all point one way, those of each batch another way."""
    parts = [torch.outer(torch.ones(5), torch.eye(6)[i]) for i in range(4)]
    mean = SpectralStatistic("effective_rank")
    for part in parts:
        mean.update(part)
    of_pooled = find("effective_rank")(pooled(parts).spectrum())

    assert_close(
        torch.stack([mean.compute(), of_pooled]), torch.tensor([1.0, 4.0], dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_gram_survives_pickling_state_dict_forward_and_merging(rows: list[Tensor]) -> None:
    expected = pooled(rows).spectrum(centred=True)
    pickled = pickle.loads(pickle.dumps(pooled(rows)))
    saved, loaded, forwarded, merged = pooled(rows[:1]), Gram(6), Gram(6), pooled(rows[:1])
    saved.persistent(True)
    loaded.persistent(True)
    loaded.load_state_dict(saved.state_dict())
    loaded.update(rows[1])
    for some in rows:
        forwarded(some)
    merged.merge_state(pooled(rows[1:]))

    for metric in (pickled, loaded, forwarded, merged):
        assert_close(metric.spectrum(centred=True).values, expected.values)
        assert metric.spectrum(centred=True).shape == expected.shape


def test_gram_reset_forgets(rows: list[Tensor]) -> None:
    metric = pooled(rows)
    metric.reset()
    metric.update(rows[1])

    assert_close(metric.spectrum().values, pooled(rows[1:]).spectrum().values)


def test_gram_under_autocast_is_not_rounded(rows: list[Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        metric = pooled(rows)

    assert_close(metric.compute(), pooled(rows).compute(), rtol=0, atol=0)


def test_gram_keeps_no_graph(rows: list[Tensor]) -> None:
    metric = pooled([some.requires_grad_() for some in rows])

    assert not any(state.requires_grad for state in metric.compute())


def test_gram_stays_on_its_device(rows: list[Tensor]) -> None:
    metric = Gram(6).to("meta")
    metric.update(rows[0].to("meta"))

    assert metric.spectrum(centred=True, num_rows=20).values.device.type == "meta"


def test_site_means_are_per_quantity_and_site() -> None:
    metric = SiteMeans(2, 4)
    metric.update(torch.tensor([[1.0, 2.0], [10.0, 20.0]]), [3, 0])
    metric.update(torch.tensor([[5.0], [50.0]]), [3])
    expected = torch.tensor([[2.0, torch.nan, torch.nan, 3.0], [20.0, torch.nan, torch.nan, 30.0]], dtype=state_dtype())

    same(metric.compute(), expected)


def test_site_means_survive_pickling_state_dict_forward_and_merging() -> None:
    first, second = (torch.tensor([[1.0, 2.0]]), [0, 1]), (torch.tensor([[5.0]]), [1])
    pickled, forwarded, merged, added = (SiteMeans(1, 2) for _ in range(4))
    pickled.update(*first)
    pickled = pickle.loads(pickle.dumps(pickled))
    pickled.update(*second)
    forwarded(*first)
    forwarded(*second)
    merged.update(*first)
    added.update(*second)
    merged.merge_state(added)

    for metric in (pickled, forwarded, merged):
        same(metric.compute(), torch.tensor([[1.0, 3.5]], dtype=state_dtype()))


def test_site_means_in_a_collection_take_only_what_is_theirs() -> None:
    collection = MetricCollection({"one": SiteMeans(1, 2)})
    collection.update(torch.tensor([[1.0, 2.0]]), [0, 1])

    same(collection.compute(), {"one": torch.tensor([[1.0, 2.0]], dtype=state_dtype())})
