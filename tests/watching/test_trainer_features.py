"""What Trainers and PyTorch do around a module: training stays the same, and the curves are those of the matrices in
training.

Oracle: numpy's singular values of what a callback copied at the same moments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, WeightAveraging
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from lightning_lowrank import Monitor, RankMonitor
from tests.trainings import Classifier, MemoryLogger, Validated

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
KINDS_OF_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
SOURCES = ("gradient", "weight", "update", "displacement")
EVERY = 3

Matrices = dict[str, NDArray[np.float64]]


@dataclass
class Moment:
    """The matrices around one step of the optimizer."""

    gradient: Matrices
    start: Matrices
    before: Matrices
    after: Matrices = field(default_factory=dict)

    def read_by(self, source: str) -> Matrices:
        """What a source reads: the change of what has a gradient, all else everywhere."""
        if source == "gradient":
            return self.gradient
        if source == "update":
            return {site: self.after[site] - self.before[site] for site in self.gradient}
        return {site: now - self.start[site] if source == "displacement" else now for site, now in self.before.items()}


class Witness(L.Callback):
    """Copies all matrices at every step."""

    def __init__(self) -> None:
        self.start: Matrices = {}
        self.moments: list[Moment] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = matrices(pl_module)

    @torch.compiler.disable
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.moments.append(Moment(matrices(pl_module, "grad"), self.start, matrices(pl_module)))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.moments[-1].after = matrices(pl_module)


def matrices(module: nn.Module, of: str = "data") -> Matrices:
    """Of every parameter that is a matrix, under the name that its curve has."""
    found = {}
    for name, parameter in module.named_parameters():
        tensor = getattr(parameter, of)
        if tensor is not None and parameter.ndim == 2:
            clean = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
            found[clean] = tensor.double().numpy().copy()
    return found


def stable_rank(matrix: NDArray[np.float64]) -> float:
    values = np.linalg.svd(matrix, compute_uv=False)
    return float((values**2).sum() / values[0] ** 2) if values[0] else 0.0


@dataclass
class Run:
    """What one or several fits leave behind."""

    logger: MemoryLogger = field(default_factory=MemoryLogger)
    witness: Witness = field(default_factory=Witness)
    remains: list[Any] = field(default_factory=list)

    def trainer(self, monitor: Monitor | None, **options: Any) -> L.Trainer:
        """A Trainer with the monitor last, as users may have it."""
        callbacks = [self.witness, *options.pop("callbacks", ()), *([monitor] if monitor else [])]
        return L.Trainer(**QUIET | {"max_epochs": 2} | options, logger=self.logger, callbacks=callbacks)

    def keep(self, module: L.LightningModule, trainer: L.Trainer) -> None:
        """Remember all that training made, and the hooks that are left."""
        hooks = [sum(len(getattr(m, kind)) for kind in KINDS_OF_HOOKS) for m in module.modules()]
        of_optimizers = [
            len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in trainer.optimizers
        ]
        states = [o.state_dict() for o in trainer.optimizers]
        self.remains += [module.state_dict(), states, list(module.losses), torch.get_rng_state(), hooks, of_optimizers]

    def assert_curves(self, steps: Sequence[int]) -> None:
        """Every curve has these steps and numpy's numbers."""
        for source in SOURCES:
            assert list(self.logger.curve(f"rank/{source}_stable_rank_median")) == list(steps)
            for step in steps:
                expected = {
                    site: stable_rank(matrix) for site, matrix in self.witness.moments[step].read_by(source).items()
                }
                found = {site: self.logger.curve(f"{source}_stable_rank/{site}").get(step, np.nan) for site in expected}
                torch.testing.assert_close(
                    found, expected, rtol=1e-4, atol=0, msg=lambda text, at=(source, step): f"{at}: {text}"
                )


def watching(**options: Any) -> Monitor:
    """Weights and all that changes them."""
    sources = ("gradients", "weights", "updates", "displacement")
    return RankMonitor(sources, "stable_rank", **{"every_n_steps": EVERY, "per_site": True} | options, detail="all")


def fitted(make: Callable[[], L.LightningModule], monitor: Monitor | None, **options: Any) -> Run:
    """One fit of one module."""
    L.seed_everything(3, verbose=False)
    run, module = Run(), make()
    trainer = run.trainer(monitor, **options)
    trainer.fit(module)
    run.keep(getattr(module, "_orig_mod", module), trainer)
    return run


def watched_as_unwatched(fit: Callable[[Monitor | None], Run], monitor: Monitor) -> Run:
    """The watched run, which left behind what the unwatched one did."""
    alone, watched = fit(None), fit(monitor)
    torch.testing.assert_close(watched.remains, alone.remains, rtol=0, atol=0)
    assert monitor.failures == monitor.skipped == 0
    return watched


# torch.compile


class Quiet(Classifier):
    """Without `self.log`, which Dynamo cannot trace on Python 3.11."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())


class ByHand(Quiet):
    """Forward, backward and the step of the optimizer in one compiled function."""

    def __init__(self) -> None:
        super().__init__(optimizer="sgd")
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        return {"loss": loss.detach()}


def compiled_step(make: Callable[[], Classifier] = Quiet, **options: Any) -> Classifier:
    """The module with its `training_step` compiled."""
    module = make()
    module.training_step = torch.compile(module.training_step, **{"backend": "aot_eager"} | options)  # type: ignore[method-assign]
    return module


def compiled_layer() -> Classifier:
    """One part of the network is a compiled module."""
    part = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    return Classifier(nn.Sequential(torch.compile(part, backend="aot_eager"), nn.Linear(32, 10)))


COMPILED: dict[str, Callable[[], L.LightningModule]] = {
    "the module": lambda: torch.compile(Quiet(), backend="aot_eager"),  # type: ignore[return-value,dict-item]
    "a layer": compiled_layer,
    "training_step": compiled_step,
    "training_step by inductor": lambda: compiled_step(backend="inductor"),
    "training_step in one graph": lambda: compiled_step(fullgraph=True),
}
of_the_compiler = pytest.mark.filterwarnings("ignore:(?!lightning_lowrank)")


@pytest.mark.slow
@of_the_compiler
@pytest.mark.parametrize("what", COMPILED)
def test_where_something_is_compiled_the_curves_are_those_of_the_matrices_in_training(what: str) -> None:
    torch.compiler.reset()
    run = watched_as_unwatched(lambda monitor: fitted(COMPILED[what], monitor), watching())

    run.assert_curves(range(0, 16, EVERY))


@pytest.mark.slow
@of_the_compiler
def test_nothing_of_a_monitor_is_compiled_with_the_whole_step() -> None:
    """Callbacks and hooks of the optimizer are called in the midst of it."""
    compiled = []

    def fit(monitor: Monitor | None) -> Run:
        torch.compiler.reset()
        counters["stats"].clear()
        run = fitted(lambda: compiled_step(ByHand), monitor, max_steps=4)
        compiled.append(dict(counters["stats"]))
        return run

    run = watched_as_unwatched(fit, watching())

    run.assert_curves([0, 3])
    assert compiled[0] == compiled[1]


class Fused(nn.Module):
    """Its first layer is in a compiled function, which no module knows of and no graph break may split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.block = torch.compile(lambda x: torch.relu(self.first(x)), backend="aot_eager", fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


@of_the_compiler
def test_a_layer_in_a_compiled_function_is_a_gap_in_its_own_curve_of_features() -> None:
    monitor = RankMonitor(("features", "gradients"), "stable_rank", every_n_steps=EVERY, per_site=True, detail="all")
    fit = lambda monitor: (torch.compiler.reset(), fitted(lambda: Classifier(Fused()), monitor))[1]  # noqa: E731
    alone = fit(None)

    with pytest.warns(UserWarning, match="feature: no number for 1 of 2 sites, the first is 'net.first.out'"):
        watched = fit(monitor)

    torch.testing.assert_close(watched.remains, alone.remains, rtol=0, atol=0)
    curves = {
        site: list(watched.logger.curve(f"feature_stable_rank/net.{site}.out").values()) for site in ("first", "head")
    }
    assert np.isnan(curves["first"]).all()
    assert np.isfinite(curves["head"]).all() and len(curves["head"]) == 6


# Activation checkpointing


class Checkpointed(nn.Module):
    """Its first part runs again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2)), nn.Linear(32, 10)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant))


def wrapped() -> nn.Module:
    """A layer in the wrapper that FSDP's users know."""
    return nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(64, 32), nn.ReLU())), nn.Linear(32, 10))


CHECKPOINTED: dict[str, Callable[[], nn.Module]] = {
    "reentrant": lambda: Checkpointed(reentrant=True),
    "without reentry": lambda: Checkpointed(reentrant=False),
    "wrapper": wrapped,
}


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_with_activation_checkpointing_the_curves_are_those_of_the_matrices_in_training(kind: str) -> None:
    run = watched_as_unwatched(lambda monitor: fitted(lambda: Classifier(CHECKPOINTED[kind]()), monitor), watching())

    run.assert_curves(range(0, 16, EVERY))


# Callbacks that change the weights


AVERAGING: dict[str, Callable[[], L.Callback]] = {
    "the mean": WeightAveraging,
    "an exponential mean": lambda: EMAWeightAveraging(decay=0.5),
}


@pytest.mark.parametrize("first", [True, False], ids=["monitor last", "monitor first"])
@pytest.mark.parametrize("kind", AVERAGING)
def test_weights_are_those_in_training_not_the_averaged(kind: str, first: bool) -> None:
    """Validation in the midst of an epoch swaps them."""

    def fit(monitor: Monitor | None) -> Run:
        averaging = [AVERAGING[kind]()]
        both = averaging if monitor is None else [*averaging, monitor] if first else [monitor, *averaging]
        return fitted(Validated, None, callbacks=both, val_check_interval=2)

    run = watched_as_unwatched(fit, watching(every_n_steps=1))

    run.assert_curves(range(16))


class Finetuned(Classifier):
    """A backbone that is frozen at first."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.backbone, self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_layers_that_are_unfrozen_have_curves_of_their_gradients_from_then_on() -> None:
    def fit(monitor: Monitor | None) -> Run:
        return fitted(
            Finetuned, monitor, callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)]
        )

    run = watched_as_unwatched(fit, watching())  # no warning: those of the tests are errors

    # The oracle has gradients of the backbone from the second epoch on.
    run.assert_curves(range(0, 16, EVERY))
    assert list(run.logger.curve("gradient_stable_rank/backbone.0.weight")) == [9, 12, 15]
    assert list(run.logger.curve("update_stable_rank/backbone.0.weight")) == [9, 12, 15]
    assert list(run.logger.curve("weight_stable_rank/backbone.0.weight")) == [0, 3, 6, 9, 12, 15]


# Several fits, several Trainers


def test_a_fit_that_goes_on_has_one_curve() -> None:
    def fit(monitor: Monitor | None) -> Run:
        L.seed_everything(3, verbose=False)
        run, module = Run(), Classifier()
        trainer = run.trainer(monitor, max_epochs=1)
        for epochs in (1, 2):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module)
            run.keep(module, trainer)
        return run

    run = watched_as_unwatched(fit, watching())

    run.assert_curves(range(0, 16, EVERY))


def wide() -> Classifier:
    """Another network, with sites of its own."""
    return Classifier(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 10)))


def test_a_trainer_that_goes_on_with_another_model_watches_that_one() -> None:
    def fit(monitor: Monitor | None) -> Run:
        L.seed_everything(3, verbose=False)
        run = Run()
        trainer = run.trainer(monitor, max_epochs=1)
        for epochs, module in ((1, Classifier()), (2, wide())):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module)
            run.keep(module, trainer)
        return run

    run = watched_as_unwatched(fit, watching())

    run.assert_curves(range(0, 16, EVERY))
    assert list(run.logger.curve("gradient_stable_rank/net.3.weight")) == [9, 12, 15]


def each_its_own() -> list[Monitor]:
    return [watching(), watching(every_n_steps=2)]


def one_for_both() -> list[Monitor]:
    return [watching()] * 2


@pytest.mark.parametrize("monitors", [each_its_own, one_for_both])
def test_trainers_in_turn_have_the_curves_of_their_own_models(monitors: Callable[[], list[Monitor]]) -> None:
    """One epoch of the first, one of the second, and once more."""
    watched = monitors()

    def fit(both: Sequence[Monitor | None]) -> list[Run]:
        L.seed_everything(3, verbose=False)
        runs, modules = [Run(), Run()], [Classifier(), wide()]
        trainers = [run.trainer(monitor, max_epochs=1) for run, monitor in zip(runs, both, strict=True)]
        for epochs in (1, 2):
            for run, trainer, module in zip(runs, trainers, modules, strict=True):
                trainer.fit_loop.max_epochs = epochs
                trainer.fit(module)
                run.keep(module, trainer)
        return runs

    alone, runs = fit([None, None]), fit(watched)

    for monitor, run, unwatched in zip(watched, runs, alone, strict=True):
        torch.testing.assert_close(run.remains, unwatched.remains, rtol=0, atol=0)
        run.assert_curves(range(0, 16, monitor.recorders[0].probe.schedule.n))
        assert monitor.failures == 0


class Within(L.Callback):
    """A fit within each epoch of another."""

    def __init__(self, inner: Monitor | None) -> None:
        self.inner, self.run = inner, Run()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 3:
            module = wide()
            within = self.run.trainer(self.inner, max_epochs=1)
            within.fit(module)
            self.run.keep(module, within)


def test_a_fit_within_a_fit_has_curves_of_its_own() -> None:
    def fit(outer: Monitor | None, inner: Monitor | None) -> tuple[Run, Run]:
        within = Within(inner)
        return fitted(Classifier, outer, callbacks=[within], max_epochs=1), within.run

    outer, inner = watching(), watching(every_n_steps=2)
    alone, watched = fit(None, None), fit(outer, inner)

    for run, unwatched, every in zip(watched, alone, (3, 2), strict=True):
        torch.testing.assert_close(run.remains, unwatched.remains, rtol=0, atol=0)
        run.assert_curves(range(0, 8, every))
