"""Weights sharded by FSDP2 and tensor parallelism have the numbers of the whole ones."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lowrank import Monitor, RankMonitor
from lightning_lowrank.distributed.shards import whole
from tests.processes import together
from tests.promises.test_data_parallel import Keep
from tests.trainings import MemoryLogger, digits

pytestmark = pytest.mark.slow

SOURCES = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features")
STATISTICS = (
    "stable_rank",
    "effective_rank",
    "participation_ratio",
    "spectral_norm",
    "weight_ratio",
    "relative_stable_rank",
)


class Adapted(nn.Linear):
    """A layer with a LoRA pair."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.lora_A, self.lora_B = nn.Linear(width, 3, bias=False), nn.Linear(3, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x))


class Net(nn.Module):
    """Fused attention, a convolution, an embedding that is tall, a LoRA pair, and sides that no number of processes
    divides.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(701, 12)
        self.convolution = nn.Conv1d(12, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.adapted = Adapted(12)
        self.up, self.down = nn.Linear(12, 50), nn.Linear(50, 12)
        self.few = nn.Linear(12, 3)
        self.head = nn.Linear(3, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embedding((pixels * 16).long() + torch.arange(64, device=pixels.device) * 10)
        x = x + self.convolution(x.mT).mT
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT / 4, -1) @ v
        x = x + self.adapted(x)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(torch.tanh(self.few(x)).mean(1))


class Sharded(L.LightningModule):
    """Trained on 16 digits a step, by one process or by several together."""

    def __init__(self, tensor_parallel: bool = False, sharded: bool = True) -> None:
        super().__init__()
        self.tensor_parallel, self.sharded = tensor_parallel, sharded
        torch.manual_seed(0)
        self.net = Net()
        nn.init.normal_(self.net.adapted.lora_B.weight, std=0.1)

    def configure_model(self) -> None:
        if not self.sharded:
            return
        mesh: Any = self.device_mesh
        if self.tensor_parallel:
            parallelize_module(self.net, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if mesh["data_parallel"].size() > 1:
            for part in (self.net.qkv, self.net.adapted, self.net.up, self.net.down):
                fully_shard(part, mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        # Leaves the root of FSDP2 with parameters that are gathered.
        self.net(batch[0])

    def train_dataloader(self) -> DataLoader[Any]:
        mesh: Any = self.device_mesh["data_parallel"] if self.sharded else None  # type: ignore[index]
        count, at = (mesh.size(), mesh.get_local_rank()) if self.sharded else (1, 0)
        return DataLoader(
            digits(), batch_size=16 // count, sampler=DistributedSampler(digits(), count, at, shuffle=False)
        )

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2, eps=1e-3)


def trained(
    module: Sharded,
    monitor: Monitor | None,
    logger: MemoryLogger,
    root: Path,
    path: str | None = None,
    also: Sequence[L.Callback] = (),
    **options: Any,
) -> tuple[Any, L.Trainer]:
    """Samples of four steps, and the Trainer after them."""
    keep = [] if monitor is None else [monitor, Keep(monitor)]
    settings = {
        "max_steps": 4,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "val_check_interval": 2,
    }
    settings |= {
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
        "enable_checkpointing": bool(also),
    }
    trainer = L.Trainer(**settings | options, logger=logger, callbacks=[*keep, *also])
    trainer.fit(module, ckpt_path=path)
    return keep[1].samples if keep else None, trainer


def watching() -> Monitor:
    return RankMonitor(SOURCES, STATISTICS, every_n_steps=1, per_site=True)


@contextmanager
def counting(seen: Counter[str]) -> Iterator[None]:
    """Bytes that this process sends to others while tensors are gathered, and how often."""
    real = dist.all_to_all_single

    def counted(output: Tensor, sent: Tensor, incoming: list[int], outgoing: list[int], *args: Any) -> Any:
        seen["sent"] += sum(outgoing) - outgoing[dist.get_rank()]
        seen["received"] += sum(incoming) - incoming[dist.get_rank()]
        seen["calls"] += 1
        return real(output, sent, incoming, outgoing, *args)

    dist.all_to_all_single = counted
    try:
        yield
    finally:
        dist.all_to_all_single = real


def on_mesh(rank: int, size: int, root: Path, data: int, tensor: int) -> Any:
    """Samples, whether training was left alone, and bytes."""
    strategy = {"data_parallel_size": data, "tensor_parallel_size": tensor, "save_distributed_checkpoint": False}
    found: dict[str, Any] = {}
    monitor, logger, seen = watching(), MemoryLogger(), Counter[str]()
    with counting(seen):
        found["samples"], trainer = trained(
            Sharded(tensor > 1), monitor, logger, root, strategy=ModelParallelStrategy(**strategy), devices=size
        )
    found |= {"bytes": seen, "rows": len(logger.rows), "failures": monitor.failures}
    watched = {name: whole(p.detach()).clone() for name, p in trainer.lightning_module.named_parameters()}
    _, trainer = trained(
        Sharded(tensor > 1), None, MemoryLogger(), root, strategy=ModelParallelStrategy(**strategy), devices=size
    )
    alone = {name: whole(p.detach()).clone() for name, p in trainer.lightning_module.named_parameters()}
    assert_close(watched, alone, rtol=0, atol=0)
    return found


def on_two(rank: int, size: int, root: Path) -> Any:
    return {
        "FSDP2": on_mesh(rank, size, root, 2, 1),
        "tensor parallel": on_mesh(rank, size, root, 1, 2),
        "resumed": resumed(rank, size, root),
    }


def resumed(rank: int, size: int, root: Path) -> Any:
    """A run stopped after two steps and resumed: the samples before and after."""
    options: dict[str, Any] = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    saving = ModelCheckpoint(root / "stopped", every_n_train_steps=2)
    settings: dict[str, Any] = {"strategy": ModelParallelStrategy(**options), "devices": size}
    before, _ = trained(Sharded(), watching(), MemoryLogger(), root, max_steps=2, also=[saving], **settings)
    monitor, logger = watching(), MemoryLogger()
    settings["strategy"] = ModelParallelStrategy(**options)
    after, _ = trained(Sharded(), monitor, logger, root, path=saving.best_model_path, **settings)
    return {"samples": before + after, "rows": 2 + len(logger.rows) if rank == 0 else 0, "failures": monitor.failures}


def on_four(rank: int, size: int, root: Path) -> Any:
    return {"both": on_mesh(rank, size, root, 2, 2), "FSDP2": on_mesh(rank, size, root, 4, 1)}


def moved(rank: int, size: int, root: Path) -> Any:
    """Bytes that move for one sample of the gradients, and in how many collectives."""
    monitor, seen = RankMonitor(("gradients",), every_n_steps=1), Counter[str]()
    strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    with counting(seen):
        trained(Sharded(), monitor, MemoryLogger(), root, strategy=strategy, devices=size, max_steps=1)
    return seen


def test_what_moves_is_at_most_twice_the_matrices_over_the_processes(tmp_path: Path) -> None:
    net = Net()
    tall = net.embedding.weight.numel()
    others = sum(p.numel() for p in net.parameters() if p.ndim > 1) - tall
    gram = 12**2

    for seen in together(moved, tmp_path, 4):
        assert seen["calls"] == 1
        assert seen["sent"] + seen["received"] <= 2 * 4 * (tall + others) / 4
        # Of the tall embedding only Gram matrices, in double precision.
        assert seen["sent"] <= 4 * others / 4 + 8 * gram + 16 * 11
        assert seen["received"] <= 1.5 * 4 * others / 4 + 3 * 8 * gram + 16 * 11


@pytest.mark.parametrize(("run", "size"), [(on_two, 2), (on_four, 4)], ids=["two", "four"])
def test_numbers_of_sharded_weights_are_those_of_whole_ones(run: Any, size: int, tmp_path: Path) -> None:
    found = together(run, tmp_path, size)
    alone, _ = trained(Sharded(sharded=False), watching(), MemoryLogger(), tmp_path)

    for name in found[0]:
        assert [rank[name]["failures"] for rank in found] == [0] * size, name
        assert [rank[name]["rows"] for rank in found] == [4] + [0] * (size - 1), name
        for rank in found:
            assert_close(rank[name]["samples"], found[0][name]["samples"], rtol=0, atol=0)
        # The sharded products round otherwise, and what training makes of that grows.
        assert_close(
            found[0][name]["samples"][0], alone[0], rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
        # Where it was resumed Lightning begins with the first batch again: only what was there before is the same.
        known = 2 if name == "resumed" else 4
        assert_close(
            found[0][name]["samples"][:known],
            alone[:known],
            rtol=1e-2,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        before = [standing(samples[2]) for samples in (found[0][name]["samples"], alone)]
        assert_close(*before, rtol=1e-2, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def standing(sample: tuple[int, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """What is read before the batch has an effect."""
    return {quantity: row for quantity, row in sample[1].items() if quantity.startswith(("weight_", "displacement_"))}
