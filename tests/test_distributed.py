"""Two processes that talk by gloo give the numbers of one."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lowrank import Features, Gram, Monitor, RankMonitor, SiteMeans, SpectralStatistic
from lightning_lowrank.metrics import state_dtype
from tests.models import Classifier, digits
from tests.oracles.spectra import gaussian
from tests.test_laws import names

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_rank(rank: int, size: int, port: int, function: Callable[[int, int, Path], Any], root: Path) -> None:
    """In a process of its own: what the function gives is saved by rank."""
    environment = {"LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    torch.save(function(rank, size, root), root / f"{rank}_of_{size}.pt")


def together(function: Callable[[int, int, Path], Any], root: Path, size: int = 2) -> list[Any]:
    """What the function gives on each of some processes."""
    mp.spawn(as_rank, args=(size, free_port(), function, root), nprocs=size)
    return [torch.load(root / f"{rank}_of_{size}.pt", weights_only=False) for rank in range(size)]


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
    source.plan(module)
    source.batch_begins(module)
    hidden = module.net[0](gaussian(3 + rank, 64, seed=rank, dtype=torch.float32))
    if rank == 0:
        module.net[2](hidden)
    source.batch_over()
    readings = source.sample_over()
    dist.destroy_process_group()
    return {reading.labels[0]: (reading.value.shape, reading.value.values) for reading in readings}  # type: ignore[union-attr]


def test_a_layer_that_one_process_never_came_by_is_read_from_the_others(tmp_path: Path) -> None:
    first, second = together(uneven, tmp_path)

    assert {label: shape for label, (shape, _) in first.items()} == {"net.0.out": (7, 32), "net.2.out": (3, 10)}
    assert_close(second, first, rtol=0, atol=0)


class InOrder(Classifier):
    """Sees 16 digits a step, on one process or on several together."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(optimizer="sgd", lr=0.1, momentum=0.9)
        self.rank, self.size = rank, size

    def train_dataloader(self) -> DataLoader[Any]:
        # The sampler that Lightning would put here shuffles.
        sampler = DistributedSampler(digits(), self.size, self.rank, shuffle=False)
        return DataLoader(digits(), batch_size=16 // self.size, sampler=sampler)


class Keep(L.Callback):
    """The samples of a monitor."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.samples: list[Any] = []

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.monitor.latest is not None
        self.samples.append((self.monitor.latest.step, {k: dict(v) for k, v in self.monitor.latest.values.items()}))


def trained(rank: int, size: int, root: Path) -> Any:
    torch.manual_seed(0)
    module = InOrder(rank, size)
    sources = ("gradients", "weights", "updates", "displacement", "features")
    monitor = RankMonitor(sources, every_n_steps=1)
    keep = Keep(monitor)
    options: dict[str, Any] = {"strategy": "ddp", "devices": size} if size > 1 else {}
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(root / f"logs_{size}", version=0, flush_logs_every_n_steps=1),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[monitor, keep],
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module)
    assert monitor.failures == 0
    facts = {r.name: r.probe.source.facts() for r in monitor.recorders}
    return {"samples": keep.samples, "facts": facts}


def test_numbers_of_two_processes_are_those_of_one_on_the_same_batches(tmp_path: Path) -> None:
    first, second = together(trained, tmp_path)
    alone = trained(0, 1, tmp_path)

    assert len(alone["samples"]) == 4
    assert_close(first, alone, rtol=1e-3, atol=1e-6)
    assert_close(second, first, rtol=0, atol=0)
    assert first["facts"]["feature"] == {"rows": 16.0}
    assert len((tmp_path / "logs_2/lightning_logs/version_0/metrics.csv").read_text().splitlines()) == 5
