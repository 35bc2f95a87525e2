"""Strategies that hide the matrices are refused before training, with what works instead."""

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_lowrank import RankMonitor
from tests.trainings import Classifier


class FSDPStrategy(SingleDeviceStrategy):
    """Goes by the name of Lightning's, which refuses CPUs."""


class DeepSpeedStrategy(SingleDeviceStrategy):
    """The same for one that is not installed."""


class Mine(DeepSpeedStrategy):
    """A user's own, derived from it."""


class FullyShardedDataParallel(nn.Sequential):
    """A layer under the name of FSDP1's wrapper."""


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, Mine])
def test_a_strategy_that_hides_the_matrices_is_refused(strategy: type[SingleDeviceStrategy]) -> None:
    trainer = L.Trainer(
        strategy=strategy(device=torch.device("cpu")),
        accelerator="cpu",
        max_epochs=1,
        callbacks=[RankMonitor(detail="all")],
        logger=False,
    )

    with pytest.raises(
        ValueError, match=r"strategy (FSDP|DeepSpeed)Strategy cannot be watched.*Use 'ddp'.*fully_shard"
    ):
        trainer.fit(Classifier())


def test_a_layer_wrapped_in_flat_pieces_is_refused() -> None:
    module = Classifier(nn.Sequential(FullyShardedDataParallel(nn.Linear(64, 10))))

    with pytest.raises(ValueError, match=r"'net\.0' is wrapped in FSDP1 and cannot be watched"):
        L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[RankMonitor(detail="all")], logger=False).fit(module)
