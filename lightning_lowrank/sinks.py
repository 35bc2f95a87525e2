"""Where reports go: the one place that waits for the device, and all loggers of the Trainer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray
from torch import Tensor

Listener = TypeVar("Listener")


def step_of(trainer: L.Trainer) -> int:
    """The x-axis of Lightning's own logging: batches that ended in an optimizer step.

    Private, but what `self.log` and Lightning's monitors use; `global_step` counts every optimizer in manual optimization.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def to_host(report: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
    """All tensors of a report as numpy arrays, in one transfer per device.

    Cost: one wait for the device. float64 where the device has it, so that nothing is rounded on the way.
    """
    arrays: dict[str, NDArray[np.float64]] = {}
    for device in {tensor.device for tensor in report.values()}:
        here = {key: tensor for key, tensor in report.items() if tensor.device == device}
        flat = torch.cat([tensor.detach().flatten().to(_widest(device)) for tensor in here.values()])
        parts = np.split(flat.cpu().numpy().astype(np.float64), np.cumsum([t.numel() for t in here.values()])[:-1])
        arrays |= {key: part.reshape(tuple(tensor.shape)) for (key, tensor), part in zip(here.items(), parts, strict=True)}
    return arrays


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def write(loggers: Iterable[Logger], scalars: Mapping[str, float], step: int) -> list[Exception]:
    """Hand one flat dict of scalars to every logger; what a logger raises is returned, not raised.

    `self.log` would be the wrong way: it repeats the last value at every `log_every_n_steps` and drops those in between.
    """
    return tell(loggers, lambda logger: logger.log_metrics(dict(scalars), step=step))


def tell(listeners: Iterable[Listener], act: Callable[[Listener], object]) -> list[Exception]:
    """Do something with each, whatever the others raise; what they raised."""
    failed: list[Exception] = []
    for listener in listeners:
        try:
            act(listener)
        except Exception as error:  # a full disk must not end a night's training
            failed.append(error)
    return failed


def mirror(trainer: L.Trainer, scalars: Mapping[str, float]) -> None:
    """Make scalars visible to ModelCheckpoint and EarlyStopping."""
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})


def summaries(values: NDArray[np.float64]) -> dict[str, float]:
    """Minimum, median and maximum over the sites that gave a number; NaN where none did."""
    known = values[np.isfinite(values)]
    if known.size == 0:
        return dict.fromkeys(("min", "median", "max"), float("nan"))
    return {"min": float(known.min()), "median": float(np.median(known)), "max": float(known.max())}


def write_histograms(loggers: Iterable[Logger], spectra: Mapping[str, NDArray[np.float64]], step: int) -> list[Exception]:
    """Histograms of log10 of the singular values, for loggers whose experiment takes histograms (TensorBoard).

    Left out is what is below 1e-8 of the largest: rounding of the Gram matrix, which would stretch the axis without end.
    """
    positive = {tag: values[values > 1e-8 * np.nanmax(values, initial=0)] for tag, values in spectra.items()}

    def draw(writer: Any) -> None:
        for tag, values in positive.items():
            if values.size:
                writer.add_histogram(tag, np.log10(values), step)

    return tell_writers(loggers, "add_histogram", draw)


def tell_writers(loggers: Iterable[Logger], method: str, act: Callable[[Any], object]) -> list[Exception]:
    """The same with the loggers' own writers that have a method; by duck-typing, for there are two packages of loggers."""

    def act_on_writer(logger: Logger) -> None:
        writer = getattr(logger, "experiment", None)
        if callable(getattr(writer, method, None)):
            act(writer)

    return tell(loggers, act_on_writer)
