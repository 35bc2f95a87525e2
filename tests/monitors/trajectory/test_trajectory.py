"""How many directions a path uses.

Oracles: closed forms, numpy's singular values of all points, and paths that are drawn.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_lowrank import TrajectorySubspace
from lightning_lowrank.monitors.trajectory.path import numbers, of_a_random_walk
from lightning_lowrank.monitors.trajectory.snapshots import Snapshots
from tests.processes import together
from tests.sharded import Sharded
from tests.sharded import trained as trained_sharded
from tests.trainings import QUIET, Classifier, MemoryLogger, Ordered, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*lightning_lowrank")


def gram(points: Tensor) -> Tensor:
    moves = points - points[0]
    return moves @ moves.mT


def test_a_straight_line_has_one_direction_and_is_straight() -> None:
    line = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None].square() * torch.randn(50).double()

    found = numbers(gram(line))

    assert_close([float(found[name]) for name in ("explained_1", "participation_ratio", "straightness")], [1.0] * 3)


def test_a_circle_has_two_directions_and_ends_where_it_began() -> None:
    angles = torch.linspace(0, 2 * math.pi, 41, dtype=torch.float64)
    found = numbers(gram(torch.stack([angles.cos(), angles.sin(), 0 * angles], 1)))

    assert float(found["explained_1"]) == pytest.approx(0.5, abs=0.03)
    assert float(found["explained_2"]) == pytest.approx(1)
    assert float(found["participation_ratio"]) == pytest.approx(2, abs=0.01)
    assert float(found["straightness"]) == pytest.approx(0, abs=1e-6)


def test_a_random_walk_has_the_shares_of_the_limit() -> None:
    found = of_a_random_walk(range(400))

    shares = [6 / (math.pi * k) ** 2 for k in range(1, 5)]
    for k in (1, 2, 4):
        assert float(found[f"explained_{k}"]) == pytest.approx(sum(shares[:k]), abs=2e-3)
    # Of 6 / (pi k)^2 over all k: 1 over the sum of squares, 36 / pi^4 zeta(4) = 0.4.
    assert float(found["participation_ratio"]) == pytest.approx(2.5, abs=1e-2)
    assert float(found["straightness"]) == pytest.approx(1 / math.sqrt(399))


@pytest.mark.parametrize("times", [range(12), [0, 4, 8, 12, 16, 17], [0, 1, 10, 100, 101, 102]])
def test_a_walk_that_is_drawn_has_what_is_said_of_walks_seen_at_these_times(times: Any) -> None:
    walk = torch.randn(max(times) + 1, 20000, generator=torch.Generator().manual_seed(0)).double().cumsum(0)

    drawn = numbers(gram(walk[list(times)]))

    said = of_a_random_walk(times)
    assert drawn.keys() == said.keys()
    assert_close([float(drawn[name]) for name in said], [float(value) for value in said.values()], rtol=0.05, atol=0)


def test_too_few_points_and_a_path_that_rests_tell_nothing() -> None:
    assert numbers(torch.zeros(2, 2)).keys() == set()
    assert all(value.isnan() for value in numbers(torch.zeros(4, 4)).values())


def test_snapshots_stay_bounded_and_spread_evenly_with_the_inner_products_of_what_is_kept() -> None:
    snapshots, draws = Snapshots(2, 8), torch.Generator().manual_seed(0)
    weight, path = torch.zeros(30), {}
    for step in range(100):
        weight = weight + torch.randn(30, generator=draws)
        path[step] = weight.clone()
        if step % 2 == 0:
            times, found = snapshots.seen(step, {"w": weight})
            assert times[-1] == step
            assert_close(found, gram(torch.stack([path[t] for t in times]).double()), rtol=1e-5, atol=1e-4)
            assert len(snapshots.times) <= 8

    assert snapshots.spacing == 16 and snapshots.times == list(range(0, 97, 16))
    assert snapshots.num_bytes == 7 * 30 * 4


def test_small_steps_far_from_the_start_keep_their_digits() -> None:
    far, snapshots = 1000 * torch.ones(1000), Snapshots(1, 8)
    points = [torch.zeros(1000), far, far + 0.01, far + 0.02 * (torch.arange(1000) % 2)]
    for step, point in enumerate(points):
        _, found = snapshots.seen(step, {"w": point})

    expected = [float((b.double() - a.double()).norm()) for a, b in pairwise(points)]
    way = found.diagonal()[1:] + found.diagonal()[:-1] - 2 * found.diagonal(1)
    assert_close(way.sqrt(), torch.tensor(expected).to(way), rtol=1e-4, atol=0)


class Look(L.Callback):
    def __init__(self) -> None:
        self.path: list[np.ndarray] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        weights = [p.detach().double().flatten().numpy() for n, p in pl_module.named_parameters() if "weight" in n]
        self.path.append(np.concatenate(weights))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_curves_are_those_of_the_parameters_at_due_steps(accumulate: int) -> None:
    look, logger = Look(), MemoryLogger()
    monitor = TrajectorySubspace(2, match="*weight", detail="all")
    options = {"max_epochs": 3, "logger": logger, "accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0}
    L.Trainer(**QUIET, **options, callbacks=[look, monitor]).fit(Ordered(mlp(16)))

    points = np.stack(look.path[:: 2 * accumulate])
    energies = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    last = {tag: list(curve.values())[-1] for tag, curve in logger.curves().items()}
    assert last["trajectory/explained_1"] == pytest.approx(energies[0] / energies.sum(), rel=1e-5)
    assert last["trajectory/participation_ratio"] == pytest.approx(energies.sum() ** 2 / (energies**2).sum(), rel=1e-5)
    assert last["trajectory/snapshots"] == len(points)
    assert last["lowrank/trajectory_bytes"] == 4 * points.size


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: TrajectorySubspace(0), "every_n_steps=0"),
    (lambda: TrajectorySubspace(max_snapshots=7), "max_snapshots=7.*at least 8"),
    (lambda: fitted(Classifier(), TrajectorySubspace(match="none*")), "matches nothing"),
    (
        lambda: fitted(Classifier().requires_grad_(False), TrajectorySubspace()),
        "none of the chosen parameters is trained",
    ),
]


def fitted(module: L.LightningModule, monitor: TrajectorySubspace) -> None:
    L.Trainer(**QUIET, max_epochs=1, logger=False, callbacks=[monitor]).fit(module)


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_had_is_refused_before_training(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def sharded(rank: int, size: int, root: Path) -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    with pytest.raises(ValueError) as refused:
        trained_sharded(Sharded(), TrajectorySubspace(), MemoryLogger(), root, strategy=strategy, devices=size)
    return str(refused.value)


@pytest.mark.slow
def test_sharded_parameters_are_refused_before_training(tmp_path: Path) -> None:
    for said in together(sharded, tmp_path):
        assert "is sharded" in said and "DDP" in said
