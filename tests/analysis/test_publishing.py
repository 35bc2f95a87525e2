"""The report in loggers without a tab, offline: what they keep is the page itself."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger

from lightning_lowrank import PublishReport, RankMonitor
from tests.trainings import QUIET, Classifier

pytestmark = pytest.mark.filterwarnings("ignore")  # of wandb, mlflow and sqlalchemy


def published(folder: Path, logger: Logger, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        **QUIET | options,
        logger=logger,
        max_steps=8,
        default_root_dir=folder,
        callbacks=[RankMonitor(every_n_steps=2), PublishReport()],
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


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        PublishReport(samples=0)
