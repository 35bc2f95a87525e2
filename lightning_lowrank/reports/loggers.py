"""Output to all loggers of a training, in the one place that waits for the device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import working_dtype

Array = NDArray[np.float64]


def to_host(report: Mapping[str, Tensor]) -> dict[str, Array]:
    """All tensors of a report as numpy arrays, in one transfer per device.

    Cost: one wait for the device. float64 where the device has it, so that nothing is rounded on the way.
    """
    arrays: dict[str, Array] = {}
    for device in {tensor.device for tensor in report.values()}:
        here = {key: tensor for key, tensor in report.items() if tensor.device == device}
        flat = torch.cat([tensor.detach().flatten().to(working_dtype(device)) for tensor in here.values()])
        parts = np.split(flat.cpu().numpy().astype(np.float64), np.cumsum([t.numel() for t in here.values()])[:-1])
        arrays |= {
            key: part.reshape(tuple(tensor.shape)) for (key, tensor), part in zip(here.items(), parts, strict=True)
        }
    return arrays


def write(
    loggers: Iterable[Any], scalars: Mapping[str, float], step: int, draws: Sequence[Callable[[Any], None]] = ()
) -> list[Exception]:
    """Hand a report to every logger and save each once; what a logger raises is returned, not raised.

    `self.log` would be the wrong way: it repeats the last value at every `log_every_n_steps` and drops those in
    between.

    Args:
        loggers: Anything with `log_metrics(metrics, step)`, as Lightning's loggers.
        scalars: By tag.
        step: On the x-axis.
        draws: What else to write, each a function of the logger's own writer (TensorBoard's `SummaryWriter`, wandb's
            run), which looks for the methods that it needs.
    """

    def hand(logger: Any) -> None:
        if _closed(logger):
            raise OSError("its file could not be written; it will be tried again when a checkpoint is saved")
        logger.log_metrics(dict(scalars), step=step)
        for draw in draws:
            draw(_experiment(logger))
        _save(logger)  # what fails later, fails in a call of Lightning's, which would end the run

    return each(loggers, hand)


def save(loggers: Iterable[Any]) -> list[Exception]:
    """Have every logger write what it holds back; what failed is tried again."""
    return [*reopen(loggers), *each(loggers, _save)]


def reopen(loggers: Iterable[Any]) -> list[Exception]:
    """Have closed TensorBoard writers begin another file."""
    return each(loggers, lambda logger: _experiment(logger)._get_file_writer() if _closed(logger) else None)


def each(loggers: Iterable[Any], act: Callable[[Any], object]) -> list[Exception]:
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


def each_writer(loggers: Iterable[Any], method: str, act: Callable[[Any], object]) -> list[Exception]:
    """The loggers' own writers that have a method; each logger is saved."""

    def act_on_writer(logger: Any) -> None:
        writer = _experiment(logger)
        if callable(getattr(writer, method, None)) and not _closed(logger):
            act(writer)
            _save(logger)

    return each(loggers, act_on_writer)


def summaries(values: Array) -> dict[str, float]:
    """Minimum, median and maximum over the sites that gave a number; NaN where none did."""
    known = values[np.isfinite(values)]
    if known.size == 0:
        return dict.fromkeys(("min", "median", "max"), float("nan"))
    return {"min": float(known.min()), "median": float(np.median(known)), "max": float(known.max())}


def draw_histograms(spectra: Mapping[str, Array], step: int) -> Callable[[Any], None]:
    """Histograms of log10 of the singular values, for writers that take histograms (TensorBoard).

    Values below 1e-8 of the largest are left out: rounding of the Gram matrix, which would stretch the axis without
    end.
    """
    positive = {tag: values[values > 1e-8 * np.nanmax(values, initial=0)] for tag, values in spectra.items()}

    def draw(writer: Any) -> None:
        if callable(getattr(writer, "add_histogram", None)):
            for tag, values in positive.items():
                if values.size:
                    writer.add_histogram(tag, np.log10(values), step)

    return draw


def draw_counts(counts: Mapping[str, Sequence[Array]], step: int) -> Callable[[Any], None]:
    """Histograms from the middles of cells of one width and from what is in each, for writers as above."""

    def draw(writer: Any) -> None:
        if not callable(getattr(writer, "add_histogram_raw", None)):
            return
        for tag, (middles, inside) in counts.items():
            half = (middles[1] - middles[0]) / 2
            ends = {"min": middles[0] - half, "max": middles[-1] + half, "bucket_limits": (middles + half).tolist()}
            sums = {"num": inside.sum(), "sum": (inside * middles).sum(), "sum_squares": (inside * middles**2).sum()}
            writer.add_histogram_raw(tag, **ends, **sums, bucket_counts=inside.tolist(), global_step=step)

    return draw


def _give_up(logger: Any) -> None:
    """Take back what a logger could not write: it would raise again when Lightning saves it, and end the run."""
    experiment = _experiment(logger)
    if hasattr(experiment, "all_writers"):  # TensorBoard's, whose thread does not outlive an error
        with suppress(Exception):
            experiment.close()
        experiment.file_writer = experiment.all_writers = None
    if isinstance(getattr(experiment, "metrics", None), list):
        # Lightning's CSV file: rows that wait, of which not all are ours.
        experiment.metrics = [row for row in experiment.metrics if not any("lowrank/" in key for key in row)]


def _save(logger: Any) -> None:
    """Loggers of other packages may have nothing to save."""
    if callable(getattr(logger, "save", None)):
        logger.save()


def _closed(logger: Any) -> bool:
    """Whether it is a TensorBoard writer without a file: given up, or at the end of an earlier run."""
    return getattr(_experiment(logger), "all_writers", ()) is None


def _experiment(logger: Any) -> Any:
    """A logger's own writer, by duck-typing: there are several packages of loggers."""
    return getattr(logger, "experiment", None)
