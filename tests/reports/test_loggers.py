"""Where curves go: every logger of the Trainer gets the same points, and callbacks can watch them."""

import csv
import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_lowrank import Monitor, RankMonitor
from tests.trainings import Adversaries, Classifier, MemoryLogger, Validated

MEDIAN = "rank/gradient_stable_rank_median"
Curves = dict[str, dict[int, float]]


class Diverging(Classifier):
    """Its loss is NaN from the eleventh batch on."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step >= 10 else 1.0)


class LogsItsGradient(Classifier):
    """Hands to Lightning's own `self.log` what a monitor measures."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("own", torch.linalg.matrix_norm(self.net[0].weight.grad, 2))


def train(module: L.LightningModule, monitor: Monitor, logger: Any, **options: Any) -> L.Trainer:
    callbacks = [monitor, *options.pop("callbacks", [])]
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
    }
    trainer = L.Trainer(logger=logger, callbacks=callbacks, **(quiet | options))
    trainer.fit(module)
    return trainer


def from_tensorboard(folder: Path) -> Curves:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def from_csv(folder: Path) -> Curves:
    curves: Curves = defaultdict(dict)
    for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines()):
        for tag, value in row.items():
            if value != "" and tag != "step":
                curves[tag][int(row["step"])] = float(value)
    return curves


def from_wandb(folder: Path) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = defaultdict(dict)
    for content in leveldb_log(next(folder.rglob("*.wandb")).read_bytes()[7:]):
        record = Record.FromString(content)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for tag, value in row.items():
            if not tag.startswith("_"):
                curves[tag][row["trainer/global_step"]] = float(value)
    return curves


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format, which W&B writes when it is offline: blocks of 32 KiB, of which the first lacks
    W&B's own header.
    """
    whole, at = b"", 0
    while at + 7 <= len(data):
        left = 32768 - (at + 7) % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield whole
            whole = b""


def from_mlflow(logger: MLFlowLogger) -> Curves:
    client, run = logger.experiment, logger.run_id
    histories = {tag: client.get_metric_history(run, tag) for tag in client.get_run(run).data.metrics}
    return {tag: {point.step: point.value for point in points} for tag, points in histories.items()}


def ours(curves: Curves) -> Curves:
    return {tag: dict(curve) for tag, curve in curves.items() if "rank" in tag}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of wandb, mlflow and sqlalchemy
def test_every_logger_has_the_same_points_nan_included(tmp_path: Path) -> None:
    import wandb

    memory, mlflow = (
        MemoryLogger(),
        MLFlowLogger("tests", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path)),
    )
    loggers = [
        TensorBoardLogger(tmp_path, name="tensorboard", version=""),
        CSVLogger(tmp_path, name="csv", version=""),
        WandbLogger(save_dir=tmp_path, offline=True, settings=wandb.Settings(console="off", silent=True)),
        mlflow,
        memory,
    ]
    train(Diverging(), RankMonitor(every_n_steps=3, detail="all"), loggers, log_every_n_steps=4)
    wandb.finish()
    tensorboard = from_tensorboard(tmp_path / "tensorboard")
    others = {"csv": from_csv(tmp_path / "csv"), "wandb": from_wandb(tmp_path / "wandb"), "mlflow": from_mlflow(mlflow)}

    handed = memory.curves()
    assert [step for step, value in handed[MEDIAN].items() if math.isnan(value)] == [12, 15]
    for curves in others.values():
        torch.testing.assert_close(ours(curves), ours(handed), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        ours(tensorboard), ours(handed), rtol=1e-6, atol=0, equal_nan=True
    )  # its scalars are float32


@pytest.mark.parametrize("log_every_n_steps", [1, 4, 50])
def test_the_cadence_is_ours_whatever_the_trainer_logs_at(log_every_n_steps: int) -> None:
    memory = MemoryLogger()

    train(Classifier(), RankMonitor(every_n_steps=3, detail="all"), memory, log_every_n_steps=log_every_n_steps)

    assert list(memory.curve(MEDIAN)) == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_points_are_where_lightning_itself_would_log_them(accumulate: int) -> None:
    memory, monitor = MemoryLogger(), RankMonitor(["gradients"], ["spectral_norm"], every_n_steps=2, detail="all")

    train(LogsItsGradient(), monitor, memory, log_every_n_steps=1, accumulate_grad_batches=accumulate)

    expected = {step: value for step, value in memory.curve("own").items() if step % 2 == 0}
    torch.testing.assert_close(memory.curve("gradient_spectral_norm/net.0.weight"), expected, rtol=1e-5, atol=0)


def test_points_are_on_the_axis_of_lightnings_monitors_with_two_optimizers() -> None:
    memory = MemoryLogger()

    train(
        Adversaries(),
        RankMonitor(every_n_steps=1, detail="all"),
        memory,
        log_every_n_steps=1,
        callbacks=[LearningRateMonitor()],
    )

    assert list(memory.curve(MEDIAN)) == list(memory.curve("lr-AdamW"))


def test_values_are_those_that_the_monitor_keeps() -> None:
    memory, monitor = MemoryLogger(), RankMonitor(every_n_steps=3, detail="all")

    train(Classifier(), monitor, memory)

    assert monitor.latest is not None
    kept = {
        f"{quantity}/{site}": value
        for quantity, values in monitor.latest.values.items()
        for site, value in values.items()
    }
    last = dict(memory.rows)[monitor.latest.step]
    assert {tag: value for tag, value in last.items() if not tag.startswith(("lowrank/", "rank/"))} == kept


@pytest.mark.parametrize(
    "options", [{}, {"per_site": True}, {"per_site": False}, {"histograms": True}, {"name": "mine"}]
)
def test_keys_are_fixed_from_the_first_sample(options: dict[str, Any], tmp_path: Path) -> None:
    everything = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features")
    memory = MemoryLogger()

    train(
        Classifier(optimizer="sgd"),
        RankMonitor(everything, every_n_steps=3, **options, detail="all"),
        memory,
        log_every_n_steps=100,
    )

    assert len({tuple(scalars) for _, scalars in memory.rows if len(scalars) > 2}) == 1


def test_the_header_of_a_csv_file_is_written_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    headers: list[str] = []

    class Reader(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            headers.append((tmp_path / "metrics.csv").read_text().partition("\n")[0])

    module = Classifier()
    module.log = lambda *_: None  # type: ignore[assignment,misc]
    train(module, RankMonitor(every_n_steps=1, detail="all"), logger, log_every_n_steps=1, callbacks=[Reader()])

    assert len(headers) == 16 and len(set(headers)) == 1


def test_two_loggers_of_a_kind_get_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]

    train(
        Classifier(),
        RankMonitor(every_n_steps=3, detail="all"),
        [CSVLogger(folder, name="", version="") for folder in folders],
    )

    first, second = map(from_csv, folders)
    assert first == second and len(first[MEDIAN]) == 6


def test_it_works_without_a_logger() -> None:
    monitor = RankMonitor(every_n_steps=3, detail="all")

    trainer = train(Classifier(), monitor, False)

    assert monitor.latest is not None and monitor.latest.step == 15
    assert monitor.latest.values["gradient_stable_rank"].keys() == {"net.0.weight", "net.2.weight"}
    assert MEDIAN in trainer.callback_metrics


class BrokenLogger(MemoryLogger):
    """A full disk."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if MEDIAN in metrics:
            raise OSError("no space left on device")


class BrokenWriter(MemoryLogger):
    """A server that is down: its experiment takes histograms and layouts, but not really."""

    @property
    def experiment(self) -> Any:
        return self

    def add_histogram(self, *_: Any) -> None:
        raise OSError("no route to host")

    add_custom_scalars = add_histogram


@pytest.mark.parametrize("broken", [BrokenLogger, BrokenWriter])
def test_a_logger_that_raises_is_counted_and_training_goes_on(broken: type[MemoryLogger]) -> None:
    memory, monitor = MemoryLogger(), RankMonitor(every_n_steps=3, histograms=True, detail="all")

    with pytest.warns(UserWarning, match="OSError: no (space|route)") as warned:
        train(Classifier(), monitor, [broken(), memory])

    assert len([w for w in warned if "lightning_lowrank" in str(w.message)]) == 1
    assert monitor.failures >= 6
    assert list(memory.curve(MEDIAN)) == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("when", [{"every_n_train_steps": 2}, {"every_n_epochs": 1}], ids=str)
def test_a_checkpoint_can_watch_a_rank(when: dict[str, int], tmp_path: Path) -> None:
    monitor, memory = RankMonitor(every_n_steps=2, detail="all"), MemoryLogger()
    checkpoint = ModelCheckpoint(tmp_path, monitor=MEDIAN, mode="min", save_top_k=1, **when)

    train(Classifier(), monitor, memory, callbacks=[checkpoint], enable_checkpointing=True)

    curve = memory.curve(MEDIAN)
    seen = curve.values() if "every_n_train_steps" in when else [curve[6], curve[14]]
    assert checkpoint.best_model_score is not None
    torch.testing.assert_close(float(checkpoint.best_model_score), min(seen), rtol=1e-6, atol=0)


@pytest.mark.parametrize("module", [Classifier, Validated])
def test_early_stopping_can_watch_a_rank(module: type[Classifier]) -> None:
    stopping = EarlyStopping(MEDIAN, stopping_threshold=0.0, mode="max", check_on_train_epoch_end=module is Classifier)

    trainer = train(module(), RankMonitor(every_n_steps=2, detail="all"), False, callbacks=[stopping])

    assert trainer.current_epoch == 1 and stopping.stopping_reason_message is not None


def deep(num_layers: int) -> Classifier:
    return Classifier(
        nn.Sequential(nn.Linear(64, 4), *(nn.Linear(4, 4) for _ in range(num_layers - 2)), nn.Linear(4, 10))
    )


@pytest.mark.parametrize(("per_site", "expected"), [("auto", 46), (False, 46), (True, 46 + 200 * 12)])
def test_a_deep_model_writes_tens_of_scalars_unless_asked_for_all(per_site: Any, expected: int) -> None:
    """Minimum, median and maximum of 4 statistics of 3 sources, 6 numbers about ourselves, and 4 alerts."""
    memory = MemoryLogger()

    train(deep(200), RankMonitor(per_site=per_site, detail="all"), memory, max_steps=1)

    assert len(memory.rows[0][1]) == expected


def test_few_sites_are_all_written() -> None:
    memory = MemoryLogger()

    train(deep(8), RankMonitor(detail="all"), memory, max_steps=1)

    assert len(memory.rows[0][1]) == 46 + 8 * 12
