"""A step can be run again, and differentiated twice, so that nobody can tell: training is the same bit for bit."""

import random
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lowrank import RankMonitor
from lightning_lowrank.loss.replay import Replay
from lightning_lowrank.watching.trainer import TrainerTraining
from tests.callbacks import Inline, Replaying
from tests.processes import together
from tests.trainings import (
    Classifier,
    Experimental,
    Fused,
    ImageNet,
    digits,
    trained,
)


class Helper:
    """An object of the user's that has a state, and knows its owner."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.history, self.average = owner, [], torch.zeros(())


class Busy(Classifier):
    """Does in its step what users do, and more."""

    def __init__(self) -> None:
        super().__init__(ImageNet())
        self.teacher = ImageNet().requires_grad_(False)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)
        self.confusions = torchmetrics.MetricCollection([torchmetrics.ConfusionMatrix("multiclass", num_classes=10)])
        self.confidences = torchmetrics.CatMetric()
        self.register_buffer("queue", torch.zeros(16, 10))
        self.register_buffer("centre", torch.zeros(10))
        self.register_buffer("large", torch.zeros(1_000_001))
        self.average = torch.zeros(10)
        self.seen, self.recent, self.counts, self.labels = 0, deque(maxlen=3), Counter(), set[int]()
        self.nested: dict[str, Any] = {"a": [{"b": [1]}], "array": np.zeros(3)}
        self.array = np.zeros(4)
        self.helper = Helper(self)
        self.own = torch.Generator().manual_seed(5)
        self.others = (random.Random(5), np.random.default_rng(5), np.random.RandomState(5))
        self.hidden: Tensor | None = None
        self.from_hooks = 0
        self.net.head.register_full_backward_hook(self._hear)
        self.net.head.weight.register_hook(self._hear)

    def _hear(self, *_: Any) -> None:
        self.from_hooks += 1

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        target = batch.pop("target")
        inputs = batch["input"].mul_(0.9)
        noise = float(np.random.rand()) + torch.rand(()) + torch.rand((), generator=self.own)
        noise += sum(other.random() if hasattr(other, "random") else other.rand() for other in self.others)
        outputs = self(inputs + 0.01 * noise)
        loss = F.cross_entropy(outputs, target)
        self._remember(outputs.detach(), target, batch_idx)
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.99
        self.log("loss", loss, prog_bar=True)
        self.log_dict({"accuracy": self.accuracy(outputs, target), "confidence": outputs.detach().max()})
        self.logger.log_metrics({"by hand": loss.item()}, step=self.seen)
        self.logger.experiment.add_scalar(self.logger.log_dir, loss.item())
        self.losses.append(loss.item())
        return {"loss": loss, "outputs": outputs.detach()}

    def _remember(self, outputs: Tensor, target: Tensor, batch_idx: int) -> None:
        self.confusions.update(outputs, target)
        self.confidences.update(outputs.max())
        self.queue.copy_(self.queue.roll(8, 0))
        self.queue[:8] = outputs
        self.centre = 0.9 * self.centre + 0.1 * outputs.mean(0)
        self.large[self.seen] = 1
        self.average.mul_(0.9).add_(outputs.mean(0))
        with torch.no_grad():
            for mine, its in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
                its.mul_(0.9).add_(mine, alpha=0.1)
            self.teacher.head.bias.data = self.teacher.head.bias + 1
        self.net.norm.weight.requires_grad_(self.seen % 3 != 1)
        self.seen += 1
        self.recent.append(batch_idx)
        self.counts.update(target.tolist())
        self.labels |= set(target.tolist())
        self.nested["a"][0]["b"].append(batch_idx)
        self.nested["array"][1] += 1
        self.nested[f"new {self.seen}"] = outputs
        self.array += 1
        self.helper.history.append(batch_idx)
        self.helper.average += outputs.mean()
        self.hidden = outputs
        self.later = batch_idx
        self.train(self.seen % 2 == 0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch["moved"] = batch["input"]

    def train_dataloader(self) -> DataLoader[Any]:
        rows = [{"input": image, "target": label} for image, label in digits()]
        return DataLoader(rows, batch_size=8, shuffle=True)  # type: ignore[arg-type]

    def states(self) -> list[Any]:
        plain = [
            self.seen,
            list(self.recent),
            dict(self.counts),
            self.labels,
            self.array,
            self.helper.history,
            self.later,
        ]
        nested = [self.nested, self.average, self.helper.average, self.hidden, list(vars(self)), self.from_hooks]
        generators = [
            self.own.get_state(),
            str(self.others[0].getstate()),
            self.others[1].random(),
            self.others[2].rand(),
        ]
        flags = [p.requires_grad for p in self.parameters()] + [m.training for m in self.modules()]
        metrics = [
            self.accuracy.metric_state,
            self.confusions.compute(),
            self.confidences.compute(),
            self.accuracy._update_count,
        ]
        return [*plain, *nested, *generators, flags, metrics, self.queue, self.centre, self.large]


def busy(callbacks: Sequence[L.Callback]) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    module, logger = Busy(), Experimental()
    settings = {
        "logger": logger,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=2, log_every_n_steps=1, accelerator="cpu", callbacks=list(callbacks), **settings)  # type: ignore[arg-type]
    trainer.fit(module)
    rows = [(step, {k: v for k, v in scalars.items() if k != "epoch"}) for step, scalars in logger.rows]
    return {
        "state": module.state_dict(),
        "states": module.states(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "gradients": [p.grad for p in module.parameters() if p.grad is not None],
        "losses": module.losses,
        "logged": (rows, logger.experiment.rows, dict(trainer.logged_metrics)),
        "random": (torch.get_rng_state(), np.random.get_state()[1]),
    }


def assert_equal(one: Any, other: Any) -> None:
    """Bit for bit, in the same order."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    elif isinstance(one, Tensor | np.ndarray):
        assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other


@pytest.mark.slow
def test_everything_that_a_step_does_is_undone() -> None:
    callback = Replaying()

    without, watched = busy([]), busy([callback])

    assert_equal(watched, without)
    assert len(callback.losses) == 16


class Failing(Replaying):
    """Fails while a replay is open, and another time in the step itself."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        training = TrainerTraining(trainer, pl_module)
        with pytest.raises(RuntimeError, match="odd"), self.replay(training):
            raise RuntimeError("odd")
        failing = Replay(loss_fn=half_way)
        failing.keep(self.replay.batch)
        with pytest.raises(RuntimeError, match="half way"), failing(training):
            pass


def half_way(module: Any, batch: Any) -> Tensor:
    module.training_step(batch, 0)
    raise RuntimeError("half way")


@pytest.mark.slow
def test_everything_is_undone_after_an_exception() -> None:
    without, watched = busy([]), busy([Failing()])

    assert_equal(watched, without)


class Slices(Classifier):
    """Sees 16 digits a step over all processes; its batch normalisation sees those of its own process."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(ImageNet())
        self.rank, self.size = rank, size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            digits(), batch_size=8, sampler=DistributedSampler(digits(), self.size, self.rank, shuffle=False)
        )


def in_parallel(rank: int, size: int, root: Path) -> Any:
    found = []
    makers = {"alone": list, "replaying": lambda: [Replaying()], "inline": lambda: [Inline()]}
    for static in (False, True):
        for kind, make in makers.items():
            if static and kind == "inline":
                continue
            L.seed_everything(0, verbose=False)
            module, callbacks = Slices(rank, size), make()
            settings: dict[str, Any] = {
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            }
            strategy = DDPStrategy(static_graph=static)
            options = {
                "devices": size,
                "accelerator": "cpu",
                "use_distributed_sampler": False,
                "logger": False,
                "max_epochs": 2,
            }
            L.Trainer(**settings, **options, strategy=strategy, callbacks=callbacks).fit(module)
            seen = [len(callback.curvatures) for callback in callbacks]
            state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            found.append((static, kind, state, module.losses, torch.get_rng_state(), seen))
    return found


@pytest.mark.slow
def test_training_in_parallel_is_the_same(tmp_path: Path) -> None:
    for process in together(in_parallel, tmp_path):
        alone = {static: rest for static, kind, *rest, _ in process if kind == "alone"}
        for static, kind, *rest, seen in process:
            assert_close(rest, alone[static], rtol=0, atol=0)
            assert seen == ([] if kind == "alone" else [8])


def test_other_monitors_do_not_count_the_rows_of_a_replay() -> None:
    found = []
    for callbacks in ([], [Replaying()]):
        L.seed_everything(1, verbose=False)
        monitor = RankMonitor("features", every_n_steps=1, detail="all")
        settings: dict[str, Any] = {
            "max_steps": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        }
        L.Trainer(**settings, enable_model_summary=False, callbacks=[*callbacks, monitor]).fit(Classifier())
        found.append((monitor.latest.values, monitor.failures))

    assert found[0] == found[1]


def test_fused_attention_is_differentiated_twice_in_a_replay(tmp_path: Path) -> None:
    callback = Replaying()
    trained(lambda: Classifier(Fused()), {"max_epochs": 1}, [callback], tmp_path)  # type: ignore[list-item]

    assert all(value != 0 for value in callback.curvatures)
