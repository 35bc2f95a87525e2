"""Monitors of what layers put out have the numbers of whole weights under FSDP2 and tensor parallelism; one that cannot
is refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_lowrank import (
    ActivationMonitor,
    CoordinateCheckMonitor,
    Monitor,
    NoiseScaleMonitor,
    RepresentationMonitor,
    RouterMonitor,
)
from tests.processes import together
from tests.sharded import Sharded, trained
from tests.trainings import MemoryLogger

pytestmark = pytest.mark.slow

WATCHING: dict[str, Callable[[], Monitor]] = {
    # Without `net.up`: FSDP2 hands it another tensor than the one that goes around it.
    "activation": lambda: ActivationMonitor(1, match=["net.qkv", "net.down", "net.few"]),
    "router": lambda: RouterMonitor(1, match=["net.head", "net.up"], top_k=2),
    "classes": lambda: RepresentationMonitor(1, match="net.down", classifier="net.few"),
}


def on_mesh(data: int, tensor: int, root: Path) -> Any:
    """First samples and failures."""
    found = {}
    for name, make in WATCHING.items():
        options: dict[str, Any] = {"data_parallel_size": data, "tensor_parallel_size": tensor}
        strategy, monitor = ModelParallelStrategy(**options, save_distributed_checkpoint=False), make()
        samples, _ = trained(Sharded(tensor > 1), monitor, MemoryLogger(), root, strategy=strategy, devices=2)
        found[name] = samples[0][1], monitor.failures
    return found


def on_two(rank: int, size: int, root: Path) -> Any:
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    with pytest.raises(ValueError, match=r"NoiseScaleMonitor: '.*' is sharded, and gradients are read whole; use DDP"):
        trained(Sharded(), NoiseScaleMonitor(1), MemoryLogger(), root, strategy=strategy, devices=size)
    with pytest.raises(
        ValueError, match=r"CoordinateCheckMonitor: '.*' is sharded, and weights are read whole; use DDP"
    ):
        trained(Sharded(), CoordinateCheckMonitor(1), MemoryLogger(), root, strategy=strategy, devices=size)
    return {"FSDP2": on_mesh(2, 1, root), "tensor parallel": on_mesh(1, 2, root)}


def test_numbers_of_sharded_weights_are_those_of_whole_ones(tmp_path: Path) -> None:
    first, second = together(on_two, tmp_path)

    for name, make in WATCHING.items():
        alone, _ = trained(Sharded(sharded=False), make(), MemoryLogger(), tmp_path)
        for mesh in first:
            assert first[mesh][name][1] == second[mesh][name][1] == 0, (mesh, name)
            for quantity, row in alone[0][1].items():
                if not quantity.endswith("shuffled"):
                    assert first[mesh][name][0][quantity] == pytest.approx(row, rel=1e-3, abs=1e-5, nan_ok=True), (
                        mesh,
                        quantity,
                    )
