"""Sources that give finished numbers, of the whole model or of each site."""

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_lowrank import Alert, Monitor
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.schedules import Every
from lightning_lowrank.models.training import Training
from tests.trainings import Classifier, MemoryLogger


class Losses(NumberSource):
    """The loss, its logarithm with an error, and the size of each layer's gradient."""

    name = "loss"

    def __init__(self) -> None:
        self.quantities = [
            Quantity("loss"),
            Quantity("log_loss", estimated=True),
            Quantity("gradient_size", per_site=True),
        ]
        self.loss: Tensor | None = None
        self.module: nn.Module | None = None

    def plan(self, training: Training) -> None:
        self.module = training.module

    def labels(self) -> Sequence[str]:
        assert self.module is not None
        return [WHOLE_MODEL, *(name for name, _ in self.module.named_parameters())]

    def loss_live(self, loss: Tensor, scale: Tensor | float) -> None:
        self.loss = loss.detach() / scale

    def numbers(self, team: Team) -> Sequence[Numbers]:
        assert self.loss is not None and self.module is not None
        log = self.loss.log()
        sizes = [Numbers(name, {"gradient_size": p.abs().sum()}) for name, p in self.module.named_parameters()]
        return [Numbers(WHOLE_MODEL, {"loss": self.loss, "log_loss": log}, {"log_loss": 0.1 * log.abs()}), *sizes]


def watched(**options: Any) -> tuple[Monitor, Classifier, MemoryLogger]:
    names = [quantity.name for quantity in Losses().quantities]
    given = {key: options.pop(key) for key in ("alerts", "name", "per_site") if key in options}
    monitor = Monitor([Probe("loss", Losses(), names, Every(2))], **given, detail="all")
    module, logger = Classifier(), MemoryLogger()
    silent: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    L.Trainer(**(silent | options), logger=logger, callbacks=[monitor]).fit(module)
    return monitor, module, logger


def test_a_number_of_the_whole_model_is_one_curve() -> None:
    _, module, logger = watched()

    assert list(logger.curve("monitor/loss")) == [0, 2, 4, 6]
    torch.testing.assert_close(list(logger.curve("monitor/loss").values()), module.losses[::2])
    assert not [tag for tag in logger.curves() if tag.startswith("monitor/loss_m")]


def test_a_number_of_each_site_has_curves_and_summaries() -> None:
    _, module, logger = watched()

    sites = [tag for tag in logger.curves() if tag.startswith("gradient_size/")]
    assert sites == [f"gradient_size/{name}" for name, _ in module.named_parameters()]
    last = [logger.curve(tag)[6] for tag in sites]
    assert logger.curve("monitor/gradient_size_max")[6] == max(last)


def test_only_what_is_estimated_has_an_error() -> None:
    _, _, logger = watched()

    assert [tag for tag in logger.curves() if tag.endswith("_error")] == ["monitor/log_loss_error"]
    torch.testing.assert_close(
        logger.curve("monitor/log_loss_error")[0], 0.1 * abs(logger.curve("monitor/log_loss")[0])
    )


def test_a_loss_is_what_the_user_computed_whatever_the_accumulation() -> None:
    _, module, logger = watched(accumulate_grad_batches=2)

    torch.testing.assert_close(list(logger.curve("monitor/loss").values()), module.losses[1::4])


def test_a_prefix_stands_before_every_quantity() -> None:
    _, _, logger = watched(name="mine")

    assert {"mine_monitor/loss", "mine_monitor/log_loss", "mine_monitor/gradient_size_max"} < set(logger.curves())


def test_an_alert_may_be_on_the_whole_model() -> None:
    monitor, _, _ = watched(alerts=[Alert("loss", above=0.0, warm_up_samples=1, for_samples=1, actions=["log"])])

    assert [event.state for event in monitor.events] == ["firing"]


def test_the_whole_model_is_announced_beside_its_sites(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)

    with caplog.at_level(logging.INFO):
        watched()

    assert "loss at 4 sites and the whole model every 2 steps" in caplog.text


def test_what_goes_wrong_in_a_number_source_is_counted_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Losses, "loss_live", lambda *_: 1 / 0)

    with pytest.warns(UserWarning, match="loss: no number.*the first is the whole model"):
        monitor, module, _ = watched()

    assert monitor.failures > 0
    assert len(module.losses) == 8


def test_a_number_source_that_is_asked_for_what_it_does_not_give_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"\['losss'\].*'log_loss'"):
        Probe("loss", Losses(), ["losss"])
