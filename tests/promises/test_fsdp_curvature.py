"""Critical sharpness takes forward passes only, so that it is there where parameters are sharded by FSDP2."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lowrank import CurvatureMonitor, Monitor
from lightning_lowrank.distributed.shards import whole
from tests.processes import together
from tests.trainings import MemoryLogger, digits

pytestmark = pytest.mark.slow

TAGS = [f"curvature/critical_{name}" for name in ("multiple", "multiple_error", "sharpness", "sharpness_error")]


class Sharded(L.LightningModule):
    """Sees 16 digits a step; its last layer is left to the root, which keeps it gathered after a forward pass."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(64, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 10)
        )

    def configure_model(self) -> None:
        if self.size > 1:
            mesh: Any = self.device_mesh["data_parallel"]  # type: ignore[index]
            for part in (self.net[0], self.net[3]):
                fully_shard(part, mesh=mesh)  # type: ignore[arg-type]
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        rank = self.trainer.global_rank
        return DataLoader(
            digits(), batch_size=16 // self.size, sampler=DistributedSampler(digits(), self.size, rank, shuffle=False)
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


def fitted(size: int, monitor: Monitor | None) -> tuple[dict[str, dict[int, float]], dict[str, Tensor]]:
    """Curves, and the weights at the end."""
    module, logger = Sharded(size), MemoryLogger()
    options: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    options |= {"use_distributed_sampler": False, "accelerator": "cpu", "max_epochs": 2, "logger": logger}
    if size > 1:
        strategy = ModelParallelStrategy(
            data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        options |= {"devices": size, "strategy": strategy}
    L.Trainer(**options, callbacks=[monitor] if monitor else []).fit(module)
    return logger.curves(), {name: whole(p.detach()).clone() for name, p in module.named_parameters()}


def sharded(rank: int, size: int, root: Path) -> dict[str, Any]:
    monitor = CurvatureMonitor("standard", [], every_n_steps=2, detail="all")
    curves, watched = fitted(size, monitor)
    _, unwatched = fitted(size, None)
    refused = ""
    try:
        fitted(size, CurvatureMonitor("light", ("hessian",), detail="all"))
    except ValueError as error:
        refused = str(error)
    return {
        "curves": curves,
        "watched": watched,
        "unwatched": unwatched,
        "failures": monitor.failures,
        "refused": refused,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return together(sharded, tmp_path_factory.mktemp("sharded"))


def test_critical_sharpness_of_sharded_parameters_is_that_of_whole_ones(found: list[dict[str, Any]]) -> None:
    alone, _ = fitted(1, CurvatureMonitor("standard", [], every_n_steps=2, detail="all"))

    assert [rank["failures"] for rank in found] == [0, 0]
    for tag in TAGS:
        assert_close(found[0]["curves"][tag], alone[tag], rtol=1e-3, atol=0)


def test_training_with_sharded_parameters_is_the_same_bit_for_bit(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert_close(rank["watched"], rank["unwatched"], rtol=0, atol=0)


def test_a_second_derivative_of_sharded_parameters_is_refused_before_training_with_what_remains(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        assert (
            "is sharded" in rank["refused"]
            and "critical sharpness needs forward passes only and remains" in rank["refused"]
        )
