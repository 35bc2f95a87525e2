"""Representations over depth in real trainings. Oracle: outputs computed by hand on the same batches, in numpy."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_lowrank import Monitor, RepresentationMonitor
from tests.processes import together
from tests.trainings import Classifier, InOrder, MemoryLogger, Validated, digits

QUIET: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Residual(nn.Module):
    """Four blocks on a stream of 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(64, 24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)) for _ in range(4))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def watched(module: L.LightningModule, monitor: Monitor, **options: Any) -> MemoryLogger:
    logger = MemoryLogger()
    L.Trainer(logger=logger, callbacks=[monitor], **QUIET, **{"max_steps": 3} | options).fit(module)
    return logger


def effective_rank(rows: NDArray[np.float64]) -> float:
    shares = np.linalg.svd(rows, compute_uv=False)
    shares = shares[shares > 1e-9 * shares[0]] / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def exponent(rows: NDArray[np.float64]) -> float:
    values = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1][: min(len(rows) - 1, rows.shape[1])]
    ranks = np.arange(max(1, round(len(values) / 20)), len(values) // 2 + 1)
    return float(-np.polyfit(np.log(ranks), np.log(values[ranks - 1]), 1, w=ranks**-0.5)[0])


def outputs(net: Residual, images: Tensor) -> list[NDArray[np.float64]]:
    """After each block."""
    found, x = [], net.embed(images)
    for block in net.blocks:
        x = block(x)
        found.append(x.detach().double().numpy())
    return found


def assert_of(found: dict[str, Any], kind: str, rows: list[NDArray[np.float64]], names: list[str]) -> None:
    for name, one in zip(names, rows, strict=True):
        expected = {
            "effective_rank": effective_rank(one),
            "centred_effective_rank": effective_rank(one - one.mean(0)),
            "alpha": exponent(one),
            "rows": len(one),
            "width": one.shape[1],
        }
        assert {key: found[f"{kind}_{key}"][name] for key in expected} == pytest.approx(expected, rel=1e-3)
        assert 0 < found[f"{kind}_alpha_fit"][name] <= 1


BLOCKS = [f"net.blocks.{i}.out" for i in range(4)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_numbers_are_those_of_what_the_blocks_put_out(accumulate: int) -> None:
    net = Residual()
    rows = outputs(net, digits()[: 16 * accumulate][0])
    monitor = RepresentationMonitor()
    watched(InOrder(0, 1, net), monitor, accumulate_grad_batches=accumulate, max_steps=1)

    assert monitor.failures == 0 and monitor.first is not None
    assert list(monitor.first.values["representation_alpha"]) == BLOCKS
    assert_of(dict(monitor.first.values), "representation", rows, BLOCKS)


def test_validation_is_read_over_the_whole_loop() -> None:
    net, monitor = Residual(), RepresentationMonitor(stages=["validation", "train"])
    module = Validated(net)
    logger = watched(module, monitor, max_epochs=1, max_steps=-1)

    assert monitor.latest is not None
    assert_of(dict(monitor.latest.values), "validation_representation", outputs(net, digits(32)[:][0]), BLOCKS)
    assert len(logger.curve("representation/validation_representation_alpha_median")) == 1


def test_chance_is_what_gaussian_rows_of_that_shape_have() -> None:
    net = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(64))
    noise = torch.randn(160, 64, generator=torch.Generator().manual_seed(0))

    class Noisy(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return self(noise).square().mean()

    monitor = RepresentationMonitor()
    watched(Noisy(net), monitor, max_steps=1)
    assert monitor.first is not None
    found = {name: row["net.0.out"] for name, row in monitor.first.values.items()}

    assert found["representation_effective_rank"] == pytest.approx(
        found["representation_effective_rank_chance"], rel=0.02
    )
    assert found["representation_alpha"] == pytest.approx(found["representation_alpha_chance"], rel=0.2)
    assert found["representation_alpha_chance"] > 0.3  # although the true covariance is flat


def test_layers_are_chosen_by_pattern_and_those_of_a_model_without_blocks_are_the_usual_ones() -> None:
    chosen, usual = RepresentationMonitor(match="net.head"), RepresentationMonitor()
    watched(Classifier(Residual()), chosen)
    watched(Classifier(), usual)

    assert list(chosen.recorders[0].sites) == ["net.head.out"]
    assert list(usual.recorders[0].sites) == ["net.0.out", "net.2.out"]


@pytest.mark.parametrize("options", [{"stages": []}, {"stages": ["test"]}, {"max_width": 0}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RepresentationMonitor(**options)


def in_parallel(rank: int, size: int, root: Path) -> Any:
    monitor = RepresentationMonitor()
    options: dict[str, Any] = {"accelerator": "cpu", "devices": size, "strategy": "ddp"} if size > 1 else {}
    watched(InOrder(rank, size, Residual()), monitor, **options)
    return monitor.first and monitor.first.values


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    first, second = together(in_parallel, tmp_path)
    (alone,) = together(in_parallel, tmp_path, 1)

    assert first == second
    for quantity, row in alone.items():
        assert first[quantity] == pytest.approx(row)
