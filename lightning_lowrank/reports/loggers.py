"""Where reports go: the one place that waits for the device, and all loggers of the Trainer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import working_dtype


def step_of(trainer: L.Trainer) -> int:
    """The x-axis of Lightning's own logging: batches that ended in an optimizer step.

    Private, but what `self.log` and Lightning's monitors use; `global_step` counts every optimizer in manual
    optimization.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    return int(loop._batches_that_stepped if hasattr(loop, "_batches_that_stepped") else trainer.global_step)


def loggers_of(trainer: L.Trainer) -> list[Logger]:
    """Those that this process writes to: one speaks for all."""
    return trainer.loggers if trainer.is_global_zero else []


def to_host(report: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
    """All tensors of a report as numpy arrays, in one transfer per device.

    Cost: one wait for the device. float64 where the device has it, so that nothing is rounded on the way.
    """
    arrays: dict[str, NDArray[np.float64]] = {}
    for device in {tensor.device for tensor in report.values()}:
        here = {key: tensor for key, tensor in report.items() if tensor.device == device}
        flat = torch.cat([tensor.detach().flatten().to(working_dtype(device)) for tensor in here.values()])
        parts = np.split(flat.cpu().numpy().astype(np.float64), np.cumsum([t.numel() for t in here.values()])[:-1])
        arrays |= {
            key: part.reshape(tuple(tensor.shape)) for (key, tensor), part in zip(here.items(), parts, strict=True)
        }
    return arrays


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def write(loggers: Iterable[Logger], scalars: Mapping[str, float], step: int) -> list[Exception]:
    """Hand one flat dict of scalars to every logger; what a logger raises is returned, not raised.

    `self.log` would be the wrong way: it repeats the last value at every `log_every_n_steps` and drops those in
    between.
    """

    def hand(logger: Logger) -> None:
        if _closed(logger):
            raise OSError("its file could not be written; it is tried again when a checkpoint is saved")
        logger.log_metrics(dict(scalars), step=step)
        logger.save()  # what fails later, fails in a call of Lightning's, which would end the run

    return each(loggers, hand)


def save(loggers: Iterable[Logger]) -> list[Exception]:
    """Have every logger write what it holds back; what failed is tried again."""
    return [*reopen(loggers), *each(loggers, lambda logger: logger.save())]


def reopen(loggers: Iterable[Logger]) -> list[Exception]:
    """Have closed TensorBoard writers begin another file."""
    return each(loggers, lambda logger: _experiment(logger)._get_file_writer() if _closed(logger) else None)


def each(loggers: Iterable[Logger], act: Callable[[Logger], object]) -> list[Exception]:
    """Do something with each, whatever the others raise; what they raised."""
    failed: list[Exception] = []
    for logger in loggers:
        try:
            act(logger)
        except Exception as error:  # a full disk must not end a night's training
            cause = error.__cause__  # Lightning says of every error of TensorBoard's that the type cannot be logged
            failed.append(cause if isinstance(cause, Exception) else error)
            with suppress(Exception):
                _give_up(logger)
    return failed


def _give_up(logger: Logger) -> None:
    """Take back what a logger could not write: it would raise again when Lightning saves it, and end the run."""
    experiment = _experiment(logger)
    if hasattr(experiment, "all_writers"):  # TensorBoard's, whose thread does not outlive an error
        with suppress(Exception):
            experiment.close()
        experiment.file_writer = experiment.all_writers = None
    if isinstance(
        getattr(experiment, "metrics", None), list
    ):  # Lightning's CSV file: rows that wait, of which not all are ours
        experiment.metrics = [row for row in experiment.metrics if not any("lowrank/" in key for key in row)]


def _closed(logger: Logger) -> bool:
    """Whether it is a TensorBoard writer without a file: given up, or at the end of an earlier run."""
    return getattr(_experiment(logger), "all_writers", ()) is None


def _experiment(logger: Logger) -> Any:
    """A logger's own writer, by duck-typing: there are two packages of loggers."""
    return getattr(logger, "experiment", None)


def mirror(trainer: L.Trainer, scalars: Mapping[str, float]) -> None:
    """Make scalars visible to ModelCheckpoint and EarlyStopping."""
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})


def summaries(values: NDArray[np.float64]) -> dict[str, float]:
    """Minimum, median and maximum over the sites that gave a number; NaN where none did."""
    known = values[np.isfinite(values)]
    if known.size == 0:
        return dict.fromkeys(("min", "median", "max"), float("nan"))
    return {"min": float(known.min()), "median": float(np.median(known)), "max": float(known.max())}


def write_histograms(
    loggers: Iterable[Logger], spectra: Mapping[str, NDArray[np.float64]], step: int
) -> list[Exception]:
    """Histograms of log10 of the singular values, for loggers whose experiment takes histograms (TensorBoard).

    Left out is what is below 1e-8 of the largest: rounding of the Gram matrix, which would stretch the axis without
    end.
    """
    positive = {tag: values[values > 1e-8 * np.nanmax(values, initial=0)] for tag, values in spectra.items()}

    def draw(writer: Any) -> None:
        for tag, values in positive.items():
            if values.size:
                writer.add_histogram(tag, np.log10(values), step)

    return each_writer(loggers, "add_histogram", draw)


def write_counts(
    loggers: Iterable[Logger], counts: Mapping[str, Sequence[NDArray[np.float64]]], step: int
) -> list[Exception]:
    """Histograms from the middles of cells of one width and from what is in each, for loggers as above."""

    def draw(writer: Any) -> None:
        for tag, (middles, inside) in counts.items():
            half = (middles[1] - middles[0]) / 2
            ends = {"min": middles[0] - half, "max": middles[-1] + half, "bucket_limits": (middles + half).tolist()}
            sums = {"num": inside.sum(), "sum": (inside * middles).sum(), "sum_squares": (inside * middles**2).sum()}
            writer.add_histogram_raw(tag, **ends, **sums, bucket_counts=inside.tolist(), global_step=step)

    return each_writer(loggers, "add_histogram_raw", draw)


def each_writer(loggers: Iterable[Logger], method: str, act: Callable[[Any], object]) -> list[Exception]:
    """The same with the loggers' own writers that have a method."""

    def act_on_writer(logger: Logger) -> None:
        writer = _experiment(logger)
        if callable(getattr(writer, method, None)) and not _closed(logger):
            act(writer)
            logger.save()

    return each(loggers, act_on_writer)
