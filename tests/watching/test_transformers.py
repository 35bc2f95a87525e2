"""A real `transformers.Trainer` on a tiny GPT-2, watched. Oracle: the same training unwatched, and numpy's ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lightning_lowrank import (
    Alert,
    ConcentrationMonitor,
    CurvatureMonitor,
    GradientAnatomyMonitor,
    Monitor,
    MultifractalMonitor,
    NTKMonitor,
    RankMonitor,
)
from lightning_lowrank.watching.transformers import WatchCallback
from tests.trainings import MemoryLogger

LAYER = "transformer.h.0.mlp.c_fc.weight"


def texts() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(32, (32, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def trained(folder: Path, *callbacks: Any, resume: Path | None = None, **options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    arguments = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "max_grad_norm": 0.5}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    chosen = TrainingArguments(output_dir=str(folder), **{**arguments, **quiet, **options})
    Trainer(model, chosen, train_dataset=texts(), callbacks=list(callbacks)).train(
        resume_from_checkpoint=resume and str(resume)
    )
    return model


def every(monitor: type[Monitor], **options: Any) -> Monitor:
    return monitor(every_n_steps=2, detail="all", **options)


def watched_by_all() -> list[Monitor]:
    kinds = (RankMonitor, MultifractalMonitor, GradientAnatomyMonitor, ConcentrationMonitor)
    return [every(kind) for kind in kinds]


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    expected = trained(tmp_path / "one")
    found = trained(tmp_path / "two", WatchCallback(*watched_by_all(), loggers=[]))

    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_monitor_has_its_numbers_at_due_steps(tmp_path: Path, accumulate: int) -> None:
    logger, monitors = MemoryLogger(), watched_by_all()
    trained(tmp_path, WatchCallback(*monitors, loggers=[logger]), gradient_accumulation_steps=accumulate)

    assert sorted({step for step, _ in logger.rows}) == [0, 2, 4]
    assert [monitor.failures for monitor in monitors] == [0, 0, 0, 0]


def test_ranks_are_those_of_the_weights(tmp_path: Path) -> None:
    monitor = RankMonitor("weights", every_n_steps=1)
    torch.manual_seed(0)
    before = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    trained(tmp_path, WatchCallback(monitor, loggers=[]), max_steps=1)
    values = np.linalg.svd(before.get_parameter(LAYER).detach().numpy(), compute_uv=False)
    assert monitor.latest is not None
    found = monitor.latest.values["weight_stable_rank"][LAYER]

    np.testing.assert_allclose(found, (values**2).sum() / values[0] ** 2, rtol=1e-6)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def monitor() -> Monitor:
        return RankMonitor(
            ["displacement", "gradients"], ["stable_rank", "subspace_overlap"], every_n_steps=2, detail="all"
        )

    whole, logger = MemoryLogger(), MemoryLogger()
    trained(tmp_path / "whole", WatchCallback(monitor(), loggers=[whole]))
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path / "part", WatchCallback(monitor(), loggers=[logger]), **saved)
    logger.rows = [(step, row) for step, row in logger.rows if step < 3]
    trained(
        tmp_path / "part",
        WatchCallback(monitor(), loggers=[logger]),
        resume=tmp_path / "part" / "checkpoint-3",
        **saved,
    )

    assert "rank/displacement_stable_rank_median" in whole.curves()
    for tag, curve in whole.curves().items():
        if not tag.endswith(("_ms", "_percent")):
            torch.testing.assert_close(logger.curve(tag), curve, rtol=0, atol=0, equal_nan=True)


def test_an_alert_stops_the_trainer(tmp_path: Path) -> None:
    rule = Alert("weight_stable_rank", below=1e9, for_samples=1, warm_up_samples=0, actions=["stop"])
    logger = MemoryLogger()
    trained(tmp_path, WatchCallback(RankMonitor("weights", every_n_steps=1, alerts=[rule]), loggers=[logger]))

    assert len(logger.rows) == 1


@pytest.mark.parametrize("monitor", [CurvatureMonitor, NTKMonitor])
def test_what_needs_the_live_loss_is_refused_with_the_way_out(tmp_path: Path, monitor: type[Monitor]) -> None:
    with pytest.raises(ValueError, match="give loss_fn"):
        trained(tmp_path, WatchCallback(monitor(), loggers=[]))


def test_a_function_without_a_batch_is_refused_with_the_way_out(tmp_path: Path) -> None:
    monitor = CurvatureMonitor(loss_fn=lambda model, batch: model(**batch).loss)
    with pytest.raises(ValueError, match=r"does not show its batches; give WatchCallback\(\.\.\., batch=\.\.\.\)"):
        trained(tmp_path, WatchCallback(monitor, loggers=[]))


def test_with_a_function_and_a_batch_the_loss_is_run_again(tmp_path: Path) -> None:
    batch = {key: torch.stack([row[key] for row in texts()[:4]]) for key in ("input_ids", "labels")}
    monitor = CurvatureMonitor(every_n_steps=3, loss_fn=lambda model, batch: model(**batch).loss)
    trained(tmp_path, WatchCallback(monitor, loggers=[], batch=batch))
    assert monitor.latest is not None

    assert monitor.failures == 0
    assert np.isfinite(monitor.latest.values["batch_sharpness"][""])
