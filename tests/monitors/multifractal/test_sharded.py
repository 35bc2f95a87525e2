"""Large sharded matrices are counted where they lie: numbers are those of the whole ones, to the last bit."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing import assert_close

from lightning_lowrank.distributed.shards import held
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.monitors.multifractal import sharded
from lightning_lowrank.monitors.multifractal.source import Multifractal
from lightning_lowrank.watching.loops import LoopTraining
from tests.processes import together
from tests.sharded import counting

pytestmark = pytest.mark.slow

PLACEMENTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "both": ((2, 2), [Shard(0), Shard(1)]),
    "copies": ((2, 2), [Replicate(), Shard(0)]),
}
CASES = [("rows", None), ("both", 30)]


def net() -> nn.Module:
    """Sides that four does not divide, and fewer rows than processes."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"plain": nn.Linear(70, 90), "qkv": nn.Linear(50, 150), "few": nn.Linear(40, 3), "frozen": nn.Linear(40, 50)}
    )


def numbers(module: nn.Module, team: Team, max_neurons: int | None) -> dict[str, dict[str, Tensor]]:
    """Values and curves of the sites that this process has."""
    source = Multifractal(max_neurons=max_neurons)
    source.plan(LoopTraining(module))
    source.batch_begins(Batch(LoopTraining(module), None, 0, 0))
    return {found.site: {**found.values, **found.curves} for found in source.numbers(team)}


def shard(module: nn.Module, sizes: tuple[int, ...], placements: list[Any]) -> nn.Module:
    """Every weight in parts, but for one that is whole on all."""
    mesh = init_device_mesh("cpu", sizes)
    for name, layer in module.items():  # type: ignore[operator]
        if name != "frozen":
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, placements))
    return module


def entries_held(sizes: tuple[int, ...], placements: list[Any]) -> list[int]:
    """Which entries of a numbered matrix this process is to count."""
    numbered = torch.arange(7 * 6).view(7, 6)
    here = held(distribute_tensor(numbered, init_device_mesh("cpu", sizes), placements))
    rows, columns = ([i for stretch in stretches for i in stretch] for stretches in here)
    return list(numbered[rows][:, columns].flatten().tolist())


def counted(rank: int, size: int, root: Path) -> Any:
    """What this process has found, with the bytes of matrices that it sent; and the entries that it held."""
    dist.init_process_group("gloo", rank=rank, world_size=size)
    sharded.LARGE = 0
    found: dict[str, Any] = {}
    for name, max_neurons in CASES:
        module, seen = shard(net(), *PLACEMENTS[name]), Counter[str]()
        with counting(seen):
            known = numbers(module, Team(rank, size), max_neurons)
        found[f"{name}, {max_neurons}"] = known, seen["sent"]
    found["held"] = {name: entries_held(*placed) for name, placed in PLACEMENTS.items()}
    dist.destroy_process_group()
    return found


def test_numbers_are_those_of_the_whole_matrices_and_no_matrix_moves(tmp_path: Path) -> None:
    found = together(counted, tmp_path, 4)

    for name, max_neurons in CASES:
        of_each = [process[f"{name}, {max_neurons}"] for process in found]
        alone = numbers(net(), Team(), max_neurons)
        assert sum(len(known) for known, _ in of_each) == len(alone)
        assert_close(
            {site: row for known, _ in of_each for site, row in known.items()}, alone, rtol=0, atol=0, equal_nan=True
        )
        assert [sent for _, sent in of_each] == [0, 0, 0, 0]
    for name in PLACEMENTS:
        assert sorted(entry for process in found for entry in process["held"][name]) == list(range(42))
