"""Monitors of what layers put out have the numbers of whole weights under FSDP2 and tensor parallelism; one that cannot
is refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_lowrank import (
    ActivationMonitor,
    AttentionMonitor,
    CoordinateCheckMonitor,
    Monitor,
    NoiseScaleMonitor,
    RepresentationMonitor,
    RouterMonitor,
)
from tests.processes import together
from tests.sharded import Net, Sharded, trained
from tests.trainings import MemoryLogger

pytestmark = pytest.mark.slow

WATCHING: dict[str, Callable[[], Monitor]] = {
    # Without `net.up`: FSDP2 hands it another tensor than the one that goes around it.
    "activation": lambda: ActivationMonitor(1, match=["net.qkv", "net.down", "net.few"]),
    "router": lambda: RouterMonitor(1, match=["net.head", "net.up"], top_k=2),
    # All rows: those that are drawn are other ones.
    "attention": lambda: AttentionMonitor(
        1, layouts={"net.qkv.weight": "qkv heads d"}, heads={"net.qkv.weight": 2}, num_rows=10_000, detail="all"
    ),
    "classes": lambda: RepresentationMonitor(1, match="net.down", classifier="net.few"),
}


class InHeads(Net):
    """The same layers, with an axis of two heads in the scores of attention."""

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embedding((pixels * 16).long() + torch.arange(64, device=pixels.device) * 10)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        x = x + (torch.softmax(q @ k.mT / 4, -1) @ v).transpose(1, 2).flatten(2)
        x = x + self.adapted(x)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(torch.tanh(self.few(x)).mean(1))


class Attending(Sharded):
    """Trains it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.net.convolution.requires_grad_(False)  # unused
        self.net.__class__ = InHeads


def module_of(name: str, *args: Any, **options: Any) -> Sharded:
    """What a monitor watches."""
    return (Attending if name == "attention" else Sharded)(*args, **options)


def on_mesh(data: int, tensor: int, root: Path) -> Any:
    """First samples and failures."""
    found = {}
    for name, make in WATCHING.items():
        options: dict[str, Any] = {"data_parallel_size": data, "tensor_parallel_size": tensor}
        strategy, monitor = ModelParallelStrategy(**options, save_distributed_checkpoint=False), make()
        samples, _ = trained(module_of(name, tensor > 1), monitor, MemoryLogger(), root, strategy=strategy, devices=2)
        found[name] = samples[0][1], monitor.failures
    return found


def on_two(rank: int, size: int, root: Path) -> Any:
    for monitor, what in ((NoiseScaleMonitor(1), "gradients"), (CoordinateCheckMonitor(1), "weights")):
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
        refusal = rf"{type(monitor).__name__}: '.*' is sharded, but {what} must be read whole; use DDP"
        with pytest.raises(ValueError, match=refusal):
            trained(Sharded(), monitor, MemoryLogger(), root, strategy=strategy, devices=size)
    return {"FSDP2": on_mesh(2, 1, root), "tensor parallel": on_mesh(1, 2, root)}


def test_numbers_of_sharded_weights_are_those_of_whole_ones(tmp_path: Path) -> None:
    first, second = together(on_two, tmp_path)

    for name, make in WATCHING.items():
        alone, _ = trained(module_of(name, sharded=False), make(), MemoryLogger(), tmp_path)
        for mesh in first:
            assert first[mesh][name][1] == second[mesh][name][1] == 0, (mesh, name)
            for quantity, row in alone[0][1].items():
                if not quantity.endswith("shuffled"):
                    assert first[mesh][name][0][quantity] == pytest.approx(row, rel=1e-3, abs=1e-5, nan_ok=True), (
                        mesh,
                        quantity,
                    )
