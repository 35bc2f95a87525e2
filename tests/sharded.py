"""A training of weights that no process has whole, by FSDP2 and tensor parallelism."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lowrank import Monitor
from tests.trainings import Keep, MemoryLogger, digits


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
