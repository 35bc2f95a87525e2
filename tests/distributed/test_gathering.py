"""Metrics and sharded tensors of processes that talk by gloo are those of one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing import assert_close

from lightning_lowrank import Features, Gram, SiteMeans, SpectralStatistic
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.gathering import gather
from lightning_lowrank.measuring.metrics import state_dtype
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.watching.loops import LoopTraining
from tests.catalogue import names
from tests.oracles.spectra import gaussian
from tests.processes import together
from tests.trainings import Classifier

pytestmark = pytest.mark.slow


def data(rank: int) -> list[Tensor]:
    """Matrices of one process; the second has twice as many."""
    return [gaussian(2 * (rank + 1), 24, 16, seed=10 * rank + i) for i in range(2)]


def measured(parts: list[list[Tensor]]) -> dict[str, Any]:
    """What metrics compute that are shown these in this process."""
    metrics = {name: SpectralStatistic(name) for name in names()}
    gram, means = Gram(16), SiteMeans(1, 3)
    for part in parts:
        for metric in metrics.values():
            metric.update(*part[: len(metric.statistic.takes)])
        gram.update(part[0])
        means.update(part[0][:1, 0, :2], [0, 1 + len(part[0]) // 4])
    spectra = {f"centred: {centred}": gram.spectrum(centred=centred) for centred in (False, True)}
    assert {spectrum.shape for spectrum in spectra.values()} == {(24 * 6, 16)}
    found = {name: metric.compute() for name, metric in metrics.items()}
    return found | {"sites": means.compute()} | {key: spectrum.values for key, spectrum in spectra.items()}


def metrics_of(rank: int, size: int, root: Path) -> dict[str, Any]:
    dist.init_process_group("gloo", rank=rank, world_size=size)
    found = measured([data(rank)])
    dist.destroy_process_group()
    return found


def test_metrics_of_two_processes_are_those_of_all_data(tmp_path: Path) -> None:
    first, second = together(metrics_of, tmp_path)
    alone = measured([data(0), data(1)])

    assert_close(first, alone, equal_nan=True)
    assert_close(second, alone, equal_nan=True)
    assert alone["sites"].dtype == state_dtype()


def uneven(rank: int, size: int, root: Path) -> dict[str, Any]:
    """A sample for which the second process never came by the second layer, and the first saw fewer rows."""
    dist.init_process_group("gloo", rank=rank, world_size=size)
    source, module = Features(), Classifier()
    source.plan(LoopTraining(module))
    source.batch_begins(Batch(LoopTraining(module), None, 0, 0))
    hidden = module.net[0](gaussian(3 + rank, 64, seed=rank, dtype=torch.float32))
    if rank == 0:
        module.net[2](hidden)
    source.batch_over()
    team = Team(rank, size)
    readings = source.sample_over(team)
    (taken,) = gather(readings, list(range(len(readings))), team, spectra_only=True, beside=False)
    dist.destroy_process_group()
    return {one.labels[0]: (one.value.shape, one.value.values) for one in taken}  # type: ignore[union-attr]


def test_a_layer_that_one_process_never_came_by_is_read_from_the_others(tmp_path: Path) -> None:
    first, second = together(uneven, tmp_path)

    assert first.keys() == {"net.0.out"}
    assert second.keys() == {"net.2.out"}
    assert {label: shape for label, (shape, _) in (first | second).items()} == {
        "net.0.out": (7, 32),
        "net.2.out": (3, 10),
    }
    assert all(torch.isfinite(values).all() for _, values in (first | second).values())


def placed(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """A tensor of several processes; one that is to be added up in equal parts that are not equal."""
    kinds = [p if not p.is_partial() else Replicate() for p in placements]
    sharded = distribute_tensor(tensor, mesh, kinds)
    share, own = 1.0, sharded.to_local()
    for axis, placement in enumerate(placements):
        if isinstance(placement, Partial):
            at, count = mesh.get_coordinate()[axis], mesh.shape[axis]
            share *= 2 * (at + 1) / (count * (count + 1)) * (count if placement.reduce_op == "avg" else 1)
    return DTensor.from_local(
        own * share, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


S0, S1, R, SUM, MEAN = Shard(0), Shard(1), Replicate(), Partial(), Partial("avg")
PLACEMENTS = [(S0, R), (R, S0), (S1, R), (S0, S1), (S1, S0), (S0, S0), (_StridedShard(0, split_factor=2), S0), (R, R)]
PLACEMENTS += [(SUM, R), (R, MEAN), (SUM, SUM), (S0, SUM), (MEAN, S1)]
SHAPES = [(10, 6), (7, 5), (3, 9), (1, 4), (40, 3), (5, 4, 3)]


def put_together(rank: int, size: int, root: Path) -> Any:
    dist.init_process_group("gloo", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    wrong, team = [], Team(rank, size)
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        for shape in SHAPES:
            true = gaussian(*shape, seed=len(shape)).to(dtype)
            kinds = [k for k in PLACEMENTS if not (isinstance(k[0], _StridedShard) and shape[0] % 4)]
            parts = [[placed(true, mesh, kind), placed(true[0].clone(), mesh["tensor"], (S0,))] for kind in kinds]
            owners = [i % size for i in range(len(kinds))]
            for kind, owner, found in zip(kinds, owners, team.gather(parts, owners), strict=True):
                assert (found is None) == (owner != rank)
                for one, whole in zip(found or [], (true, true[0]), strict=False):
                    close = torch.allclose(one, whole, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
                    wrong += [] if close else [f"{dtype} {shape} {kind}"]
    dist.destroy_process_group()
    return wrong


def test_a_tensor_in_every_placement_is_put_together_on_its_owner(tmp_path: Path) -> None:
    assert together(put_together, tmp_path, 4) == [[]] * 4
