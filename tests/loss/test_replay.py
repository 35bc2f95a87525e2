"""What a replay sees is the loss of the kept batch, as the module is now."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_lowrank.loss.replay import Replay, first_examples, halves
from lightning_lowrank.watching.trainer import Mute, TrainerTraining
from tests.trainings import Adversaries, Classifier, Experimental, ImageNet, MemoryLogger, critic_loss


class Once(L.Callback):
    """Does something at the end of the second batch."""

    def __init__(self, act: Callable[[L.Trainer, Any], None]) -> None:
        self.act = act

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batch = batch

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            self.act(trainer, pl_module)


def once(module: L.LightningModule, act: Callable[[L.Trainer, Any, Any], Any], **options: Any) -> Any:
    """What comes of it in the middle of a training."""
    found: list[Any] = []
    callback = Once(lambda trainer, pl_module: found.append(act(trainer, pl_module, callback.batch)))
    settings: dict[str, Any] = {
        "max_steps": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    settings |= {"enable_model_summary": False, "accelerator": "cpu"}
    L.seed_everything(1, verbose=False)
    L.Trainer(**settings | options, callbacks=[callback]).fit(module)
    return found[0]


def kept(batch: Any, **options: Any) -> Replay:
    replay = Replay(**options)
    replay.keep(batch, 1)
    return replay


def test_every_replay_draws_the_same_numbers() -> None:
    def act(trainer: L.Trainer, module: Any, batch: Any) -> list[float]:
        replay, losses = kept(batch), []
        for _ in range(2):
            with replay(TrainerTraining(trainer, module)) as seen:
                losses.append(seen.loss.item())
            torch.rand(3)
        with kept(batch, seed=7)(TrainerTraining(trainer, module)) as seen:
            return [*losses, seen.loss.item()]

    first, second, other = once(Classifier(ImageNet()), act)

    assert first == second != other


def test_in_eval_mode_the_loss_is_that_of_the_eval_mode() -> None:
    def act(trainer: L.Trainer, module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        with kept(batch, eval_mode=True)(TrainerTraining(trainer, module)) as seen:
            found = seen.loss.detach()
        assert module.training and module.net.norm.training
        module.eval()
        expected = F.cross_entropy(module(batch[0]), batch[1]).detach()
        module.train()
        return found, expected

    assert_close(*once(Classifier(ImageNet()), act))


def test_a_loss_function_takes_the_place_of_the_step() -> None:
    def act(trainer: L.Trainer, module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        with kept(batch, loss_fn=critic_loss)(TrainerTraining(trainer, module)) as seen:
            return seen.loss.detach(), critic_loss(module, batch).detach()

    assert_close(*once(Adversaries(), act))


def test_the_precision_is_that_of_the_trainer() -> None:
    def act(trainer: L.Trainer, module: Any, batch: Any) -> torch.dtype:
        with kept(batch)(TrainerTraining(trainer, module)) as seen:
            assert not torch.is_autocast_enabled("cpu")
            return seen.output_loss().outputs.dtype

    assert once(Classifier(), act, precision="bf16-mixed") == torch.bfloat16


def test_the_loss_of_a_replay_is_known_in_its_outputs() -> None:
    def act(trainer: L.Trainer, module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        with kept(batch, num_examples=3)(TrainerTraining(trainer, module)) as seen:
            outputs = seen.output_loss()
            assert outputs.outputs.shape == (3, 10)
            return outputs.value(), seen.loss.detach()

    assert_close(*once(Classifier(), act, accumulate_grad_batches=4))


def test_gradients_of_a_replay_are_those_of_the_step() -> None:
    def act(trainer: L.Trainer, module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        params = list(module.parameters())
        with kept(batch)(TrainerTraining(trainer, module)) as seen:
            found = torch.autograd.grad(seen.loss, params)
        return found, torch.autograd.grad(F.cross_entropy(module(batch[0]), batch[1]), params)

    assert_close(*once(Classifier(), act))


def test_hooks_of_the_user_neither_hear_of_a_replay_nor_change_its_gradients() -> None:
    heard: list[Any] = []

    def act(trainer: L.Trainer, module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        params = list(module.parameters())
        expected = torch.autograd.grad(F.cross_entropy(module(batch[0]), batch[1]), params)[0]
        hooks = [params[0].register_hook(lambda gradient: heard.append(1) or 2 * gradient)]
        hooks.append(module.net[0].register_full_backward_hook(lambda *_: heard.append(1)))
        with kept(batch)(TrainerTraining(trainer, module)) as seen:
            found = torch.autograd.grad(seen.loss, params)[0]
        assert len(params[0]._backward_hooks) == len(module.net[0]._backward_hooks) == 1
        for hook in hooks:
            hook.remove()
        return found, expected

    assert_close(*once(Classifier(), act))
    assert heard == []


class NoNumber(Classifier):
    """Its step does without the number of the batch."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


def test_a_step_without_the_number_of_the_batch_is_run_again() -> None:
    def act(trainer: L.Trainer, module: Any, batch: Any) -> bool:
        with kept(batch)(TrainerTraining(trainer, module)) as seen:
            return seen.loss.requires_grad

    assert once(NoNumber(), act)


def test_a_step_in_manual_optimization_is_not_run_again() -> None:
    def act(trainer: L.Trainer, module: Any, batch: Any) -> None:
        with (
            pytest.raises(ValueError, match=r"it steps optimizers; give loss_fn\(module, batch\)"),
            kept(batch)(TrainerTraining(trainer, module)),
        ):
            pass

    once(Adversaries(), act)


def test_a_step_without_a_loss_is_refused() -> None:
    def act(trainer: L.Trainer, module: Any, batch: Any) -> None:
        with (
            pytest.raises(ValueError, match="loss_fn returned a NoneType instead of a loss"),
            kept(batch, loss_fn=lambda *_: None)(TrainerTraining(trainer, module)),
        ):
            pass

    once(Classifier(), act)


def test_a_replay_without_a_batch_is_refused() -> None:
    trainer, module = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), Classifier()

    with pytest.raises(ValueError, match="no batch has been kept"), Replay()(TrainerTraining(trainer, module)):
        pass


def test_a_kept_batch_is_a_copy() -> None:
    batch = [torch.ones(4, 2), {"labels": torch.arange(4)}]
    replay = kept(batch)
    batch[0].zero_()

    assert_close(replay.batch[0], torch.ones(4, 2))


def test_the_first_examples_are_kept_of_what_has_one_leading_size() -> None:
    batch = {"x": torch.arange(8).view(4, 2), "y": (torch.arange(4), "name"), "scale": torch.tensor(2.0)}
    uneven = (torch.ones(4, 2), torch.ones(3))

    assert_close(first_examples(batch, 2)["y"][0], torch.arange(2))
    assert first_examples(batch, 2)["scale"] == 2.0 and first_examples(batch, 2)["y"][1] == "name"
    assert first_examples(uneven, 2) is uneven


def test_the_halves_of_a_batch_have_every_example_once() -> None:
    first, second = halves({"x": torch.arange(10).view(5, 2), "names": list("abcde"), "scale": torch.tensor(2.0)})

    assert (first["x"][:, 0].tolist(), second["x"][:, 0].tolist()) == ([0, 4, 8], [2, 6])
    assert (first["names"], second["names"], first["scale"]) == (list("ace"), list("bd"), 2.0)
    for batch, there_is in (
        ((torch.ones(4), torch.ones(3)), "with different leading sizes"),
        (torch.ones(1), "one example"),
    ):
        with pytest.raises(ValueError, match=f"a batch of .*{there_is} cannot be halved"):
            halves(batch)


def test_a_muted_logger_is_what_it_was_and_writes_nothing() -> None:
    logger = Experimental()
    mute: Any = Mute(logger)
    mute.log_metrics({"a": 1.0}, step=1)
    mute.experiment.add_scalar("a", 1.0)

    assert isinstance(mute, MemoryLogger) and mute.name == "memory" and mute.log_dir == "somewhere"
    assert logger.rows == logger.experiment.rows == []


def test_a_batch_that_cannot_be_copied_is_refused_with_the_reason() -> None:
    trainer, module = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), Classifier()
    message = r"cannot be copied \(TypeError: cannot pickle 'generator' object\).*let the loader return tensors"

    with pytest.raises(ValueError, match=message), kept(row for row in [1])(TrainerTraining(trainer, module)):
        pass
