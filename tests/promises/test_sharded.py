"""Weights sharded by FSDP2 and tensor parallelism have the numbers of the whole ones."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.testing import assert_close

from lightning_lowrank import Monitor, RankMonitor
from lightning_lowrank.distributed.shards import whole
from tests.processes import together
from tests.sharded import Net, Sharded, counting, trained
from tests.trainings import MemoryLogger

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


def watching() -> Monitor:
    return RankMonitor(SOURCES, STATISTICS, every_n_steps=1, per_site=True, detail="all")


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
    monitor, seen = RankMonitor(("gradients",), every_n_steps=1, detail="all"), Counter[str]()
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
