"""Monitors in Hugging Face's `transformers.Trainer`; needs `transformers`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightning_lowrank.watching.loops import LoopTraining, Watching
from lightning_lowrank.watching.monitor import Monitor

# The file in each checkpoint folder of the Trainer.
STATE = "lowrank.pt"


class WatchCallback(TrainerCallback):
    """Watch a `transformers.Trainer`.

    Gradients are read in `on_pre_optimizer_step`: accumulated, synchronised, unscaled, and clipped, as the optimizer
    gets them. The x-axis is the Trainer's global step. The state is saved in each checkpoint folder as `lowrank.pt`,
    and a resumed run loads it.

    The Trainer gives its callbacks neither the loss nor the batches. Monitors that need a loss (`CurvatureMonitor`,
    `NTKMonitor`) therefore take `loss_fn=` and run it on `batch`. Without it they raise an error when training starts.

    Args:
        monitors: What to measure.
        loggers: Anything with `log_metrics(metrics, step)`; by default a TensorBoard logger in `output_dir/lowrank`.
        batch: A batch on the model's device, for monitors with `loss_fn`.

    Raises:
        ValueError: When training starts: something to measure does not exist, or a monitor needs the live loss.

    Examples:
        >>> from lightning_lowrank import RankMonitor
        >>> WatchCallback(RankMonitor(every_n_steps=10)).monitors
        [RankMonitor(every_n_steps=10)]
    """

    def __init__(self, *monitors: Monitor, loggers: Sequence[Any] | None = None, batch: Any = None) -> None:
        self.monitors, self._loggers, self._batch = list(monitors), loggers, batch
        self._watch: Watching | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Choose the sites, and go on where a run was stopped."""
        folder = args.output_dir or "."
        loggers = [TensorBoardLogger(folder, "lowrank", version="")] if self._loggers is None else self._loggers
        for monitor in self.monitors if self._batch is None else ():
            if any(getattr(recorder.probe.source, "loss_fn", None) for recorder in monitor.recorders):
                raise ValueError(
                    f"{monitor!r}: transformers.Trainer does not show its batches; give WatchCallback(..., batch=...)"
                )
        training = _HiddenLoss(model, [optimizer], loggers, folder, total_steps=state.max_steps)
        self._watch = Watching(training, self.monitors)
        self._watch.begins()
        kept = _kept(args, state)
        if state.global_step and kept.exists():
            self._watch.load_state_dict(torch.load(kept, map_location=training.device, weights_only=True))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask whether a sample is due; its micro-batches are heard together."""
        if self._watch is not None:
            self._watch.batch_begins(self._batch)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read the gradients."""
        if self._watch is not None:
            self._watch.gradients()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report; an alert may ask for the end of the training."""
        if self._watch is not None:
            self._watch.batch_over()
            control.should_training_stop |= self._watch.should_stop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the state beside the Trainer's own."""
        kept = _kept(args, state)
        if self._watch is not None and state.is_world_process_zero and kept.parent.is_dir():
            torch.save(self._watch.state_dict(), kept)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave no hook behind."""
        if self._watch is not None:
            self._watch.ends()
            self._watch = None


def _kept(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the state of this step is kept."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / STATE


class _HiddenLoss(LoopTraining):
    """A loop that shows neither loss nor batches."""

    def no_live_graph(self) -> str | None:
        """There is none to look at."""
        return "transformers.Trainer, which does not show its loss"

    def refuse_rerun(self) -> None:
        """Refuse: there is no step that could be called.

        Raises:
            ValueError: With the way out.
        """
        raise ValueError("transformers.Trainer has no training_step to run again")
