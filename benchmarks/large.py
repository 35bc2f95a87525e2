"""A real FSDP2 training of GPT-2's 124 M parameters by 4 processes of gloo, counted beside what was planned for it.

    python -m benchmarks.large

Bytes and collectives of ours are counted as torch dispatches them, and memory as tensors are made, inside of what the
monitor does; the training's own are not.
"""

import logging
import os
import socket
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gpu import GPT
from lightning_lowrank import RankMonitor
from lightning_lowrank.analysis.planning.counting import Counting
from lightning_lowrank.analysis.planning.plan import plan_of
from lightning_lowrank.analysis.planning.telling import size
from lightning_lowrank.watching.watch import Watch

WORDS = 33
EXCHANGE, POOL = "alltoall_base_", "allreduce_"


class Collectives(TorchDispatchMode):
    """Counts collectives; the bytes that a process sends to others in exchanges, and those that it adds to sums."""

    def __init__(self, rank: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rank, self.calls, self.bytes = rank, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            self.calls[name] += 1
            if name == EXCHANGE:
                outgoing = args[4]
                self.bytes[name] += sum(outgoing) - outgoing[self.rank]
            elif name == POOL:
                self.bytes[name] += sum(tensor.nbytes for tensor in args[0])
        return function(*args, **kwargs or {})


@dataclass
class Seen:
    """What was counted in one process.

    Attributes:
        calls: Step -> collective -> how often.
        bytes: Step -> collective -> bytes sent to others, or added up.
        peak: Most bytes at once of tensors that the monitor made.
        failures: Numbers that were lost.
        steps_ms: Of each step.
    """

    calls: dict[int, Counter[str]] = field(default_factory=dict)
    bytes: dict[int, Counter[str]] = field(default_factory=dict)
    peak: int = 0
    failures: int = 0
    steps_ms: list[float] = field(default_factory=list)


class Each(L.Callback):
    """Files what was counted under the step that it was counted in; comes after the monitor."""

    def __init__(self, collectives: Collectives, seen: Seen) -> None:
        self.collectives, self.seen, self.began = collectives, seen, 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.calls[batch_idx], self.seen.bytes[batch_idx] = self.collectives.calls, self.collectives.bytes
        self.collectives.calls, self.collectives.bytes = Counter(), Counter()
        self.seen.steps_ms.append(1000 * (time.perf_counter() - self.began))


class Large(L.LightningModule):
    """GPT-2's shape, sharded by FSDP2."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.sizes = sizes

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        self.net = GPT(**self.sizes)
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.net, mesh=mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        logits = self.net(batch[0][:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


@contextmanager
def within_monitor(*modes: TorchDispatchMode) -> Iterator[None]:
    """What the monitor does is done under them, what the training does is not."""
    guard, inside = Watch._guard, False

    @contextmanager
    def guarded(watch: Watch, **options: Any) -> Iterator[None]:
        nonlocal inside
        with guard(watch, **options), ExitStack() as stack:
            # Once, where guards are nested: each mode would count again.
            if not inside:
                inside = True
                stack.callback(leave)
                for mode in modes:
                    stack.enter_context(mode)
            yield

    def leave() -> None:
        nonlocal inside
        inside = False

    with patch.object(Watch, "_guard", guarded):
        yield


def trained(rank: int, num_devices: int, root: Path, sizes: dict[str, int], steps: int, every: int) -> Seen:
    """One of the processes."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    collectives, counting, seen = Collectives(rank), Counting(), Seen()
    monitor = RankMonitor(every_n_steps=every)
    strategy = ModelParallelStrategy(
        data_parallel_size=num_devices, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    words = torch.randint(sizes["vocabulary"], (num_devices * steps, WORDS))
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=num_devices,
        max_steps=steps,
        default_root_dir=root,
        callbacks=[monitor, Each(collectives, seen)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with within_monitor(collectives, counting):
        trainer.fit(Large(sizes), DataLoader(TensorDataset(words), 1))
    seen.peak, seen.failures = counting.peak, monitor.failures
    return seen


def as_rank(rank: int, num_devices: int, port: int, root: Path, run: Callable[..., Any]) -> None:
    """In a process of its own."""
    names = {"LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": num_devices, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)
    torch.save(run(rank, num_devices, root), root / f"{rank}.pt")


def main(num_devices: int = 4, depth: int = 12, width: int = 768, vocabulary: int = 50257, steps: int = 4) -> None:
    """Print what was counted beside the plan.

    Args:
        num_devices: Processes.
        depth: Blocks of the transformer.
        width: Of them.
        vocabulary: Tokens.
        steps: Of training, with a sample at every other one.
    """
    sizes = {"depth": depth, "width": width, "vocabulary": vocabulary, "length": WORDS}
    with torch.device("meta"):
        model = GPT(**sizes)
    plan = plan_of(model, (), "cpu", num_devices=num_devices, every_n_steps=2)
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        run = partial(trained, sizes=sizes, steps=steps, every=2)
        torch.multiprocessing.spawn(as_rank, (num_devices, port, Path(folder), run), num_devices)  # type: ignore[no-untyped-call, attr-defined]
        found: list[Seen] = [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(num_devices)]
    Console(width=110).print(report(plan.num_parameters, plan.costs, found))


def report(num_parameters: int, costs: Any, found: list[Seen]) -> Table:
    """Counted beside planned."""
    table = Table(title=f"{num_parameters / 1e6:.0f} M parameters, FSDP2, {len(found)} processes of gloo, float32")
    for heading in ("what", "planned", "counted, lowest process", "highest"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    due, others = range(0, len(found[0].steps_ms), 2), range(1, len(found[0].steps_ms), 2)

    def row(what: str, planned: str, counts: list[int], say: Callable[[float], str]) -> None:
        table.add_row(what, planned, say(min(counts)), say(max(counts)))

    exchanged = [seen.bytes[step][EXCHANGE] for seen in found for step in due]
    row("bytes sent in exchanges of a sample", f"{size(min(costs.sent))} to {size(max(costs.sent))}", exchanged, size)
    row("exchanges of a sample", str(costs.collectives), [s.calls[i][EXCHANGE] for s in found for i in due], str)
    row("bytes added up", size(costs.pooled), [s.bytes[i][POOL] for s in found for i in due], size)
    row("collectives in a step without a sample", "0", [s.calls[i].total() for s in found for i in others], str)
    row("memory made at the peak", size(costs.peak), [s.peak for s in found], size)
    table.add_row("  of that kept from before the step", size(costs.kept), "", "")
    table.add_row("largest matrix", size(costs.largest), "", "")
    row("numbers lost", "0", [s.failures for s in found], str)
    seconds = [[s.steps_ms[i] / 1000 for s in found for i in steps] for steps in (due, others)]
    table.caption = f"seconds of a step with a sample {max(seconds[0]):.1f}, without {max(seconds[1]):.1f}, two cores"
    return table


if __name__ == "__main__":
    auto_cli(main)
