"""What users do to a module while it is watched."""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lowrank import Every, Gradients, Monitor, Probe, RankMonitor, Weights
from tests.trainings import Classifier, MemoryLogger

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def fit(module: L.LightningModule, monitor: Monitor | None, **options: Any) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    options = {"max_epochs": 1, "logger": False} | options
    trainer = L.Trainer(**QUIET, **options, callbacks=[monitor] if monitor else [])
    trainer.fit(module)
    return trainer


class Moody(nn.Module):
    """A parametrization that counts and averages outside of its buffers, and refuses evaluation if told so."""

    def __init__(self, *, strict: bool = False) -> None:
        super().__init__()
        self.calls, self.strict, self.average = 0, strict, torch.zeros(())

    def forward(self, weight: Tensor) -> Tensor:
        if self.strict and not self.training:
            raise RuntimeError("only in training")
        self.calls += 1
        self.average.mul_(0.9).add_(0.1 * weight.detach().mean())
        return weight * (1 + 0.01 * self.calls) + self.average


def moody(**options: bool) -> Classifier:
    torch.manual_seed(1)
    layer = nn.Linear(64, 10)
    parametrize.register_parametrization(layer, "weight", Moody(**options), unsafe=True)
    return Classifier(layer)


@pytest.mark.parametrize("strict", [False, True])
def test_a_parametrization_with_a_memory_is_read_without_a_trace(strict: bool) -> None:
    without, watched = moody(strict=strict), moody(strict=strict)
    fit(without, None)
    monitor = RankMonitor(("weights", "updates", "gradients"), every_n_steps=1, detail="all")

    fit(watched, monitor)

    assert monitor.latest is not None
    assert watched.losses == without.losses


def test_a_parametrization_that_comes_in_training_is_seen() -> None:
    class Triangular(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.tril()

    class Changing(Classifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                parametrize.register_parametrization(self.net, "weight", Triangular())

    module, monitor = (
        Changing(nn.Linear(64, 10, bias=False)),
        RankMonitor("weights", "frobenius_norm", every_n_steps=15, detail="all"),
    )
    weights: list[Tensor] = []
    module.on_before_optimizer_step = lambda optimizer: weights.append(module.net.weight.detach().clone())  # type: ignore[method-assign]
    fit(module, monitor, max_epochs=2)

    assert monitor.latest is not None
    assert monitor.latest.values["weight_frobenius_norm"]["net.weight"] == pytest.approx(
        weights[15].norm().item(), rel=1e-6
    )


def test_layers_of_transposed_shapes_have_an_overlap() -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    monitor = RankMonitor("gradients", ("stable_rank", "subspace_overlap"), every_n_steps=2, detail="all")
    fit(Classifier(net), monitor)

    assert monitor.latest is not None
    assert all(0 < value <= 1 for value in monitor.latest.values["gradient_subspace_overlap"].values())


def test_one_matrix_that_cannot_be_read_leaves_the_others() -> None:
    class Odd(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.flags = nn.Parameter(torch.ones(8, 8, dtype=torch.bool), requires_grad=False)

    monitor = RankMonitor("displacement", "stable_rank", every_n_steps=2, detail="all")
    with pytest.warns(UserWarning, match="no number for 1 of 3 sites, the first is 'flags'"):
        fit(Odd(), monitor)

    assert monitor.latest is not None
    assert monitor.latest.values["displacement_stable_rank"]["net.0.weight"] > 1


def test_sites_have_all_their_points_or_none_whatever_else_is_due() -> None:
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(9)), nn.Linear(64, 10))
    statistics = [
        "stable_rank",
        "participation_ratio",
        "effective_rank_energy",
        "spectral_norm",
        "frobenius_norm",
        "effective_rank",
    ]
    logger = MemoryLogger()
    fit(
        Classifier(net),
        Monitor(
            [Probe("gradient", Gradients(), statistics, Every(2)), Probe("weight", Weights(), statistics, Every(4))],
            detail="all",
        ),
        logger=logger,
    )

    assert logger.curve("monitor/gradient_stable_rank_median").keys() == {0, 2, 4, 6}
    assert "gradient_stable_rank/net.0.weight" not in logger.tags()


def test_every_fit_begins_anew() -> None:
    monitor = RankMonitor("displacement", ("frobenius_norm", "subspace_overlap"), every_n_steps=4, detail="all")
    fit(Classifier(), monitor)
    fit(Classifier(nn.Linear(64, 10)), monitor)

    assert monitor.first is not None
    assert monitor.first.values["displacement_frobenius_norm"] == {"net.weight": 0}


class Silent(torch.optim.SGD):
    """An optimizer that never calls the hooks of a step."""

    def register_step_post_hook(self, hook: Any) -> Any:
        return super().register_step_pre_hook(lambda *_: None)


def test_an_optimizer_without_hooks_is_read_when_the_batch_is_over() -> None:
    class Own(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Silent(self.parameters(), lr=0.1)

    logger, monitor = MemoryLogger(), RankMonitor(every_n_steps=4, detail="all")
    fit(Own(), monitor, logger=logger)

    assert monitor.failures == monitor.skipped == 0
    assert monitor.latest is not None
    assert monitor.latest.step == 4
    assert monitor.latest.values["update_stable_rank"]["net.0.weight"] >= 1


def test_a_copy_of_a_watched_layer_is_no_longer_watched(tmp_path: Path) -> None:
    class Copying(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.targets = [copy.deepcopy(self.net[0]), pickle.loads(pickle.dumps(self.net[2]))]
            return loss

    module, monitor = Copying(), RankMonitor("features", every_n_steps=1, detail="all")
    fit(module, monitor)

    for target in module.targets:
        assert all(hook.hear is None for hook in target._forward_hooks.values())
    assert monitor.failures == 0


def test_an_epoch_that_the_module_ends_leaves_no_hook() -> None:
    class Leaving(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

        def on_train_epoch_end(self) -> None:
            self.hooks = [len(m._forward_hooks) for m in self.modules()]

    module = Leaving()
    fit(module, RankMonitor("features", every_n_steps=2, detail="all"))

    assert sum(module.hooks) == 0


def test_differences_of_half_precision_weights_are_not_rounded_again() -> None:
    module, monitor = (
        # Differences of numbers near each other are exact: these move far.
        Classifier(optimizer="sgd", lr=2.0),
        RankMonitor("displacement", "effective_rank", every_n_steps=7, detail="all"),
    )
    before = [None, None]
    module.on_train_start = lambda: before.__setitem__(0, module.net[0].weight.detach().float())  # type: ignore[method-assign]
    module.on_before_optimizer_step = lambda optimizer: before.__setitem__(1, module.net[0].weight.detach().float())  # type: ignore[method-assign]
    fit(module, monitor, precision="bf16-true", max_steps=8)

    values = torch.linalg.svdvals((before[1] - before[0]).double())
    shares = values[values > 0] / values.sum()
    assert monitor.latest is not None
    measured = monitor.latest.values["displacement_effective_rank"]["net.0.weight"]
    assert measured == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-6)
