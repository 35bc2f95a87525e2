"""What leaves the device: one transfer, summaries that leave out what is missing, histograms of spectra."""

import csv
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lowrank import RankMonitor
from lightning_lowrank.reports import loggers as sinks
from tests.trainings import Classifier, MemoryLogger


def test_a_report_arrives_as_it_was() -> None:
    report = {
        "matrix": torch.arange(6, dtype=torch.float64).reshape(2, 3) / 7,
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "flag": torch.tensor(True),
        "nothing": torch.zeros(0),
    }

    host = sinks.to_host(report)

    expected = {
        "matrix": report["matrix"].numpy(),
        "half": np.array([1.5, np.nan]),
        "flag": np.array(1.0),
        "nothing": np.zeros(0),
    }
    assert host.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(host[key], expected[key])


def test_an_empty_report_is_empty() -> None:
    assert sinks.to_host({}) == {}


def test_summaries_leave_out_sites_without_a_number() -> None:
    assert sinks.summaries(np.array([np.nan, 3.0, 1.0, np.inf, 2.0, 10.0])) == {"min": 1.0, "median": 2.5, "max": 10.0}


@pytest.mark.parametrize("values", [[], [np.nan], [np.inf, np.nan]])
def test_summaries_of_nothing_are_nan(values: list[float]) -> None:
    assert all(np.isnan(value) for value in sinks.summaries(np.array(values)).values())


def test_one_failing_logger_does_not_keep_the_others_from_writing() -> None:
    class Broken(MemoryLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            raise OSError("no space left on device")

    last = MemoryLogger()

    failed = sinks.write([Broken(), last], {"a": 1.0}, 5)

    assert [str(error) for error in failed] == ["no space left on device"]
    assert last.rows == [(5, {"a": 1.0})]


def watched(root: Path, monitor: L.Callback, **options: object) -> EventAccumulator:
    """A run of 16 steps, as TensorBoard reads it."""
    loggers = [TensorBoardLogger(root, name="", version=""), CSVLogger(root)]
    settings = {
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    L.Trainer(logger=loggers, callbacks=[monitor], **(settings | options)).fit(Classifier())
    return EventAccumulator(str(root), size_guidance={"histograms": 0}).Reload()


def test_spectra_are_histograms_of_their_logarithms(tmp_path: Path) -> None:
    monitor = RankMonitor(["weights"], every_n_steps=16, histograms=True, detail="all")
    weight = Classifier().net[2].weight.detach()

    class Start(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.net[2].weight.data.copy_(weight)

    settings = {
        "max_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    L.Trainer(logger=TensorBoardLogger(tmp_path, name="", version=""), callbacks=[monitor, Start()], **settings).fit(
        Classifier()
    )
    histogram = EventAccumulator(str(tmp_path)).Reload().Histograms("weight_spectrum/net.2.weight")[0].histogram_value

    expected = np.log10(np.linalg.svd(weight.double().numpy(), compute_uv=False))
    assert histogram.num == 10
    np.testing.assert_allclose(
        [histogram.min, histogram.max, histogram.sum], [expected.min(), expected.max(), expected.sum()], rtol=1e-6
    )


def test_spectra_are_sampled_at_the_cadence_of_the_curves(tmp_path: Path) -> None:
    events = watched(tmp_path, RankMonitor(every_n_steps=5, histograms=True, detail="all"))

    expected = {f"{source}_spectrum/net.{i}.weight" for source in ("gradient", "weight", "update") for i in (0, 2)}
    assert set(events.Tags()["histograms"]) == expected
    assert all([e.step for e in events.Histograms(tag)] == [0, 5, 10, 15] for tag in expected)


def test_there_are_no_histograms_unless_asked_for(tmp_path: Path) -> None:
    assert watched(tmp_path, RankMonitor(every_n_steps=5, detail="all")).Tags()["histograms"] == []


def test_a_writer_that_an_earlier_run_closed_is_written_to_again(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    settings = {
        "max_steps": 5,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }

    for _ in range(2):
        L.Trainer(logger=logger, callbacks=[RankMonitor(every_n_steps=2, detail="all")], **settings).fit(Classifier())

    events = EventAccumulator(str(tmp_path)).Reload().Scalars("rank/gradient_stable_rank_median")
    assert sorted(event.step for event in events) == [0, 0, 2, 2, 4, 4]


def test_points_are_in_the_file_before_the_checkpoint_is(tmp_path: Path) -> None:
    found: list[list[int]] = []

    class Reader(L.Callback):
        def on_save_checkpoint(self, *_: object) -> None:
            rows = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
            found.append([int(row["step"]) for row in rows if row["rank/gradient_stable_rank_median"]])

    callbacks = [
        RankMonitor(every_n_steps=3, detail="all"),
        ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=5),
        Reader(),
    ]
    settings = {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 100}
    L.Trainer(logger=CSVLogger(tmp_path, name="", version=""), callbacks=callbacks, **settings).fit(Classifier())

    assert found[:3] == [[0, 3], [0, 3, 6, 9], [0, 3, 6, 9, 12]]
