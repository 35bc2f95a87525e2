"""The report in loggers without a tab, offline: what they keep is the page itself."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from lightning_lowrank import PublishReport, RankMonitor
from lightning_lowrank.analysis.page import reader_of
from lightning_lowrank.analysis.pictures import pictures
from lightning_lowrank.reports.vectors import Row, Vectors
from tests.tab import damage
from tests.trainings import QUIET, Classifier

pytestmark = pytest.mark.filterwarnings("ignore")  # of wandb, mlflow and sqlalchemy


def published(
    folder: Path, logger: Logger, media: bool = False, more: Sequence[L.Callback] = (), **options: Any
) -> L.Trainer:
    trainer = L.Trainer(
        **QUIET | options,
        logger=logger,
        max_steps=8,
        default_root_dir=folder,
        callbacks=[RankMonitor(every_n_steps=2), PublishReport(media=media), *more],
    )
    trainer.fit(Classifier())
    return trainer


def test_mlflow_has_the_page_as_an_artifact(tmp_path: Path) -> None:
    logger = MLFlowLogger(
        "tests", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts")
    )

    trainer = published(tmp_path, logger)

    (page,) = (tmp_path / "artifacts").rglob("lowrank/report.html")
    assert '"route": "diagnosis"' in page.read_text() and "weight_stable_rank" in page.read_text()
    assert trainer.loggers == [logger]


def test_wandb_has_the_page_as_a_medium(tmp_path: Path) -> None:
    import wandb

    logger = WandbLogger(save_dir=tmp_path, offline=True, settings=wandb.Settings(console="off", silent=True))

    published(tmp_path, logger)
    wandb.finish()

    pages = list((tmp_path / "wandb").rglob("media/html/**/*.html"))
    assert pages and "weight_stable_rank" in pages[-1].read_text()


def test_no_page_is_published_twice(tmp_path: Path) -> None:
    import wandb

    logger = WandbLogger(save_dir=tmp_path, offline=True, settings=wandb.Settings(console="off", silent=True))
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, save_top_k=-1, save_last=True)
    each_epoch = ModelCheckpoint(tmp_path / "epochs", every_n_epochs=1, save_top_k=-1)

    published(tmp_path, logger, enable_checkpointing=True, more=[checkpoint, each_epoch])
    wandb.finish()

    files = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/html/**/*.html"))
    pages = [file.read_text() for file in files]
    assert len(pages) == len(set(pages)) == 2, files


@pytest.mark.filterwarnings("always:.*is damaged")
def test_a_damaged_event_file_is_a_warning_and_a_note_on_the_page(tmp_path: Path) -> None:
    class Damaging(L.Callback):
        """A broken disk, between two checkpoints."""

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                damage(tmp_path / "lowrank" / "version_0", 0.9)

    logger = MLFlowLogger(
        "tests", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts")
    )
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, save_top_k=-1)

    with pytest.warns(UserWarning, match=r"lightning_lowrank: .*tfevents.* is damaged after step \d+: ") as warned:
        published(tmp_path, logger, enable_checkpointing=True, more=[Damaging(), checkpoint])

    assert len([one for one in warned if "is damaged" in str(one.message)]) == 1
    (page,) = (tmp_path / "artifacts").rglob("lowrank/report.html")
    assert "is damaged after step" in page.read_text()


def test_every_run_of_a_callback_publishes_its_page(tmp_path: Path) -> None:
    publish = PublishReport()
    for name in ("one", "two"):
        logger = MLFlowLogger(
            name, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / name)
        )
        trainer = L.Trainer(
            **QUIET, logger=logger, max_steps=8, default_root_dir=tmp_path, callbacks=[RankMonitor(), publish]
        )
        trainer.fit(Classifier())

    assert len(list(tmp_path.rglob("lowrank/report.html"))) == 2


MAPS = {f"map_{source}_effective_rank" for source in ("gradient", "update", "weight")}


def test_mlflow_has_the_first_view_and_the_maps_as_images(tmp_path: Path) -> None:
    logger = MLFlowLogger(
        "tests", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts")
    )

    published(tmp_path, logger, media=True)

    assert {file.stem for file in (tmp_path / "artifacts").rglob("lowrank/*.png")} == {"diagnosis", *MAPS}
    assert len(list((tmp_path / "artifacts").rglob("lowrank/report.html"))) == 1


def test_wandb_has_the_first_view_and_the_maps_as_images(tmp_path: Path) -> None:
    import wandb

    logger = WandbLogger(save_dir=tmp_path, offline=True, settings=wandb.Settings(console="off", silent=True))

    published(tmp_path, logger, media=True)
    wandb.finish()

    images = [file.stem for file in (tmp_path / "wandb").rglob("media/images/lowrank/*.png")]
    assert {name.rsplit("_", 2)[0] for name in images} == {"diagnosis", *MAPS}


def test_images_are_published_at_checkpoints_too(tmp_path: Path) -> None:
    logger = MLFlowLogger(
        "tests", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts")
    )
    seen: list[int] = []

    class Look(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(len(list((tmp_path / "artifacts").rglob("lowrank/*.png"))))

    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, save_top_k=-1)
    published(tmp_path, logger, media=True, enable_checkpointing=True, more=[checkpoint, Look()])

    assert seen[0] == 0 and seen[-1] == 1 + len(MAPS)


def test_maps_are_multiples_of_the_first_value_with_names_as_they_are(tmp_path: Path) -> None:
    name = "$blocks_{0}.weight"
    known = {"source": "weight", "statistic": "effective_rank"}
    values = {0: [8.0, 4.0], 1: [16.0, 4.0], 2: [32.0, math.nan]}
    writer, vectors = SummaryWriter(str(tmp_path / "run")), Vectors()
    for step, row in values.items():
        sites = dict(zip((name, "head.weight"), row, strict=True))
        vectors.draw([Row("vector", "weight_effective_rank", sites, known)], step)(writer)
    writer.close()

    files = pictures(reader_of(tmp_path / "run"), tmp_path)

    image = imread(files["map_weight_effective_rank"])[..., :3]
    colours = {tuple(round(255 * float(part)) for part in pixel) for pixel in image.reshape(-1, 3)}
    most, none, lost = (156, 76, 2), (242, 242, 242), (150, 150, 150)
    assert set(files) == {"diagnosis", "map_weight_effective_rank"} and {most, none, lost} <= colours


def test_other_loggers_are_left_alone(tmp_path: Path) -> None:
    trainer = published(tmp_path, CSVLogger(tmp_path))

    assert len(trainer.loggers) == 1 and not list(tmp_path.rglob("report.html"))


def test_what_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(CSVLogger):
        run_id = "run"

        @property
        def experiment(self) -> Any:
            return self

        def log_artifact(self, *args: object) -> None:
            raise OSError("no room")

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            """Nothing is kept."""

        def save(self) -> None:
            """Nothing was."""

    Refusing.__name__ = "MLFlowLogger"

    with pytest.warns(UserWarning, match=r"the report was not published \(OSError: no room\)"):
        published(tmp_path, Refusing(tmp_path))


def test_images_without_matplotlib_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lowrank.analysis.publishing.find_spec", lambda _: None)

    with pytest.raises(ValueError, match=r"pip install 'lightning-lowrank\[plots\]'"):
        PublishReport(media=True)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        PublishReport(samples=0)
