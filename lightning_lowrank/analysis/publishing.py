"""The report of a run for loggers without our tab: Weights & Biases and MLflow."""

import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lowrank.analysis.page import page_of, reader_of
from lightning_lowrank.analysis.pictures import pictures
from lightning_lowrank.reports.loggers import each

# The group of everything that is published.
GROUP = "lowrank"


class PublishReport(L.Callback):
    """Publish the report of `lightning-lowrank report` to Weights & Biases and MLflow, at every checkpoint and at the
    end of the run, unless it is still the same. They then show the diagnosis and the maps of all layers without
    TensorBoard.

    Monitors write the numbers of single layers to TensorBoard's event files. If the Trainer has no logger for these,
    one is added after the others for the run, in `lowrank` below the Trainer's root. Weights & Biases gets the page as
    the HTML medium `lowrank/report`, MLflow as the artifact `lowrank/report.html`. Without either logger nothing
    happens.

    With `media=True` they also get images: the diagnosis, and for each source with ranks a map of its layers over
    steps. A map shows multiples of each layer's first value, as in `lowrank/map_weight_effective_rank`.

    Cost: the first process reads the event files and writes the page, while the others wait at the checkpoint.
    Images take one to three more seconds on one core.

    Args:
        samples: Largest number of samples of each quantity, evenly spread.
        media: Whether to publish images too, drawn with matplotlib.

    Raises:
        ValueError: `samples` is below 1, or there is no matplotlib to draw `media`.

    Examples:
        >>> PublishReport(samples=200).samples
        200
    """

    def __init__(self, samples: int = 512, media: bool = False) -> None:
        if samples < 1:
            raise ValueError(f"samples={samples} must be at least 1")
        if media and find_spec("matplotlib") is None:
            raise ValueError(
                "media=True needs matplotlib, which is not installed: run pip install 'lightning-lowrank[plots]', or "
                "leave media out"
            )
        self.samples, self.media = samples, media
        self._added: TensorBoardLogger | None = None
        self._published = ""
        self._warned: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add a logger for event files if there is none."""
        self._published = ""
        published = any(map(_publish_of, trainer.loggers))
        if stage == "fit" and published and not any(isinstance(one, TensorBoardLogger) for one in trainer.loggers):
            self._added = TensorBoardLogger(Path(trainer.default_root_dir) / "lowrank", name="")
            trainer.loggers = [*trainer.loggers, self._added]
            rank_zero_info(f"lightning_lowrank: the event files for the report are in {self._added.log_dir}")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Publish the report so far."""
        self._publish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Publish the whole report."""
        self._publish(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the Trainer's loggers."""
        if self._added is not None:
            self._added.experiment.close()
            trainer.loggers = [logger for logger in trainer.loggers if logger is not self._added]
            self._added = None

    def _publish(self, trainer: L.Trainer) -> None:
        targets = [logger for logger in trainer.loggers if _publish_of(logger)]
        files = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
        if not trainer.is_global_zero or not targets or files is None:
            return
        for error in each([files], lambda logger: self._send(logger, targets)):
            rank_zero_warn(f"lightning_lowrank: the report was not published ({type(error).__name__}: {error})")

    def _warn(self, said: str) -> None:
        """Once, since a damaged file is read again at every checkpoint."""
        if said not in self._warned:
            self._warned.add(said)
            rank_zero_warn(f"lightning_lowrank: {said}")

    def _send(self, files: TensorBoardLogger, targets: list[Any]) -> None:
        files.experiment.flush()
        folder = Path(files.log_dir)
        page = folder / "report.html"
        try:
            reader = reader_of(folder, self._warn)
        except ValueError:  # no monitor has written anything yet
            return
        content = page_of(reader, folder.name, self.samples)
        if content == self._published:
            return
        page.write_text(content, encoding="utf-8")
        images = pictures(reader, folder) if self.media else {}
        errors = each(targets, lambda logger: _publish_of(logger)(logger, page, images))
        if errors:
            raise errors[0]
        self._published = content


def _publish_of(logger: Any) -> Any:
    """How a logger takes a page, None where it takes none; by its name, for there are two packages of loggers."""
    kinds = {"WandbLogger": _to_wandb, "MLFlowLogger": _to_mlflow}
    return next((kinds[kind.__name__] for kind in type(logger).__mro__ if kind.__name__ in kinds), None)


def _to_wandb(logger: Any, page: Path, images: Mapping[str, Path]) -> None:
    wandb = importlib.import_module("wandb")
    media = {name: wandb.Image(str(file)) for name, file in images.items()}
    media["report"] = wandb.Html(str(page), inject=False)
    logger.experiment.log({f"{GROUP}/{name}": medium for name, medium in media.items()})


def _to_mlflow(logger: Any, page: Path, images: Mapping[str, Path]) -> None:
    for file in (page, *images.values()):
        logger.experiment.log_artifact(logger.run_id, str(file), GROUP)
