"""A monitor never ends a run: real training runs with faults put in, beside the same runs unwatched."""

import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lowrank import Features, Monitor, RankMonitor
from lightning_lowrank.measuring.sampling import Sampling
from lightning_lowrank.measuring.sources import features
from lightning_lowrank.measuring.sources.gradients import Gradients
from lightning_lowrank.measuring.sources.updates import Updates
from tests.monitors import MONITORS
from tests.trainings import Adversaries, Classifier, MemoryLogger, logged

EVERYTHING = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features")
FAULTY_STEPS = (2, 4)
FAULTY, SOUND = "gradient_stable_rank/net.0.weight", "gradient_stable_rank/net.2.weight"


class Faulty(Classifier):
    """Something happens to the gradient of the first layer, and the user's own hook mends it before the optimizer
    steps.
    """

    def __init__(self, fault: Callable[[nn.Parameter], Tensor | None]) -> None:
        super().__init__()
        self.fault, self.kept = fault, None

    def on_after_backward(self) -> None:
        weight = self.net[0].weight
        if self.global_step in FAULTY_STEPS:
            self.kept = weight.grad
            weight.grad = self.fault(weight)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.global_step in FAULTY_STEPS:
            self.net[0].weight.grad = self.kept


def with_entry(value: float) -> Callable[[nn.Parameter], Tensor]:
    """A fault: one entry of the gradient is that value."""

    def fault(weight: nn.Parameter) -> Tensor:
        gradient = weight.grad.clone()
        gradient[1, 2] = value
        return gradient

    return fault


def trained(
    make: Callable[[], L.LightningModule], monitors: Sequence[Monitor], **options: Any
) -> tuple[dict[str, Tensor], MemoryLogger]:
    """Final weights, and what was logged."""
    logger = MemoryLogger()
    settings = {
        "max_steps": 6,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.seed_everything(3, verbose=False)
    module = make()
    L.Trainer(**settings | options, logger=logger, callbacks=list(monitors)).fit(module)
    return module.state_dict(), logger


def watched_as_unwatched(make: Callable[[], L.LightningModule], monitor: Monitor, **options: Any) -> MemoryLogger:
    """What was logged in a watched run that ends with the weights of the unwatched one."""
    alone, _ = trained(make, [], **options)
    watched, logger = trained(make, [monitor], **options)
    torch.testing.assert_close(watched, alone, rtol=0, atol=0)
    return logger


def gradient_monitor(**options: Any) -> Monitor:
    """Gradients at every step and site."""
    return RankMonitor(("gradients",), every_n_steps=1, per_site=True, **options, detail="all")


def missing(curve: dict[int, float]) -> list[int]:
    """Steps at which a curve has no number."""
    return [step for step, value in curve.items() if np.isnan(value)]


def ours(caught: pytest.WarningsRecorder) -> list[str]:
    """What this package warned of; Lightning has warnings of its own."""
    return [str(w.message) for w in caught if str(w.message).startswith("lightning_lowrank")]


LOST = {"nan": with_entry(float("nan")), "inf": with_entry(float("inf")), "none": lambda weight: None}


@pytest.mark.parametrize("fault", LOST)
def test_a_lost_gradient_is_a_gap_in_one_curve_a_count_and_one_warning(fault: str) -> None:
    monitor = gradient_monitor()

    with pytest.warns(UserWarning, match="gradient: no number for 1 of 2 sites, the first is 'net.0.weight'") as caught:
        logger = watched_as_unwatched(lambda: Faulty(LOST[fault]), monitor)

    assert len(ours(caught)) == 1
    assert missing(logger.curve(FAULTY)) == list(FAULTY_STEPS)
    assert missing(logger.curve(SOUND)) == []
    assert list(logger.curve("lowrank/rank_failures").values()) == [0, 0, 1, 1, 2, 2]
    assert monitor.failures == 2


def test_a_zero_gradient_has_rank_zero() -> None:
    monitor = gradient_monitor()

    logger = watched_as_unwatched(lambda: Faulty(lambda weight: torch.zeros_like(weight)), monitor)

    assert [step for step, value in logger.curve(FAULTY).items() if value == 0] == list(FAULTY_STEPS)
    assert monitor.failures == 0


def test_a_sparse_gradient_is_read_as_the_dense_one() -> None:
    dense = watched_as_unwatched(lambda: Faulty(lambda weight: weight.grad), gradient_monitor())

    sparse = watched_as_unwatched(lambda: Faulty(lambda weight: weight.grad.to_sparse()), gradient_monitor())

    assert sparse.curve(FAULTY) == dense.curve(FAULTY)


class Rotating(nn.Module):
    """A complex layer among real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.phases = nn.Parameter(torch.randn(16, 16, dtype=torch.complex64) / 4)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.first(x).to(torch.complex64) @ self.phases).abs())


def test_complex_weights_have_curves() -> None:
    monitor = RankMonitor(every_n_steps=1, per_site=True, detail="all")

    logger = watched_as_unwatched(lambda: Classifier(Rotating()), monitor)

    assert monitor.failures == 0
    for source in ("gradient", "weight", "update"):
        curve = logger.curve(f"{source}_stable_rank/net.phases")
        assert len(curve) == 6
        assert missing(curve) == []


class Freezing(Classifier):
    """The first layer is frozen from the fourth step on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].weight.requires_grad_(self.global_step < 3)


def test_a_layer_that_freezes_ends_its_curve() -> None:
    """Its parameter is none of those that train: the sample that it freezes in has no number, those after no point."""
    with pytest.warns(UserWarning, match="no number for 1 of 2 sites") as caught:
        logger = watched_as_unwatched(Freezing, gradient_monitor())

    assert len(ours(caught)) == 1
    assert list(logger.curve(FAULTY)) == [0, 1, 2, 3]
    assert missing(logger.curve(FAULTY)) == [3]
    assert missing(logger.curve(SOUND)) == []


class Growing(Classifier):
    """In the second epoch layers take the place of others, with parameters of their own."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.new = layers

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            for name, layer in self.new.items():
                self.net.set_submodule(name, layer)
                self.optimizers().optimizer.add_param_group({"params": layer.parameters()})


def test_a_layer_that_appears_has_a_curve_from_then_on() -> None:
    monitor = gradient_monitor()
    make = lambda: Growing(**{"1": nn.Sequential(nn.ReLU(), nn.Linear(32, 32))})  # noqa: E731

    logger = watched_as_unwatched(make, monitor, max_steps=-1, max_epochs=2, limit_train_batches=3)

    assert list(logger.curve("gradient_stable_rank/net.1.1.weight")) == [3, 4, 5]
    assert missing(logger.curve("gradient_stable_rank/net.1.1.weight")) == missing(logger.curve(FAULTY)) == []
    assert monitor.failures == 0


def test_a_layer_replaced_by_one_of_another_shape_keeps_its_curve() -> None:
    monitor = RankMonitor(
        ("gradients", "weights", "updates"),
        ("stable_rank", "subspace_overlap"),
        every_n_steps=1,
        per_site=True,
        detail="all",
    )
    make = lambda: Growing(**{"0": nn.Linear(64, 16), "2": nn.Linear(16, 10)})  # noqa: E731

    logger = watched_as_unwatched(make, monitor, max_steps=-1, max_epochs=2, limit_train_batches=3)

    assert monitor.failures == 0
    assert len(logger.curve(FAULTY)) == 6
    assert missing(logger.curve(FAULTY)) == []
    # Nothing to compare with at the first sample, and at the first of the new shape.
    assert missing(logger.curve("gradient_subspace_overlap/net.0.weight")) == [0, 3]


class BothAdam(Adversaries):
    """Two optimizers that both keep moments of a matrix."""

    def configure_optimizers(self) -> list[Optimizer]:
        return [torch.optim.AdamW(self.generator.parameters()), torch.optim.AdamW(self.critic.parameters())]


def test_states_that_show_optimizer_by_optimizer_are_all_in_the_first_report() -> None:
    monitor = RankMonitor(
        ("optimizer_state",), ("stable_rank",), every_n_steps=1, per_site=True, min_size=1, detail="all"
    )

    logger = watched_as_unwatched(BothAdam, monitor)

    for site in ("generator.weight", "critic.weight"):
        curve = logger.curve(f"first_moment_stable_rank/{site}")
        assert list(curve) == [0, 1, 2]
        assert missing(curve) == []


# Failures inside of our own code


def failing(method: Callable[..., Any], error: BaseException, *, on_call: int = 1) -> Callable[..., Any]:
    """The same function, but at one of its calls it raises."""
    calls = count(1)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == on_call:
            raise error
        return method(*args, **kwargs)

    return wrapper


def test_a_matrix_that_cannot_be_decomposed_costs_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = torch.linalg.eigvalsh

    def picky(matrix: Tensor, **options: str) -> Tensor:
        if matrix.shape[-1] == 10 and matrix.any():
            raise torch.linalg.LinAlgError("did not converge")
        return solve(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigvalsh", picky)

    with pytest.warns(UserWarning, match="no number for 1 of 2 sites, the first is 'net.2.weight'") as caught:
        logger = watched_as_unwatched(Classifier, gradient_monitor())

    assert len(ours(caught)) == 1
    assert missing(logger.curve(SOUND)) == list(range(6))
    assert missing(logger.curve(FAULTY)) == []


@pytest.mark.filterwarnings("ignore:.*rule gradient_.*_non_finite")
def test_a_solver_that_always_fails_does_not_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(matrix: Tensor, **options: str) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", broken)

    with pytest.warns(UserWarning, match="no number for 2 of 2 sites") as caught:
        logger = watched_as_unwatched(Classifier, gradient_monitor())

    failure, alert = ours(caught)
    assert "no number for 2 of 2 sites" in failure and "decompositions failed" in alert
    assert logger.curve("lowrank/rank_failures")[5] == 12


FAILURES: dict[str, tuple[type, str, BaseException, str]] = {
    "at the gradients": (Gradients, "gradients_final", RuntimeError("odd"), "gradient"),
    "in the hook after the step": (Updates, "step_done", RuntimeError("odd"), "update"),
    "no memory left": (Updates, "gradients_final", torch.OutOfMemoryError("out of memory"), "update"),
    "while pooling outputs": (Features, "sample_over", RuntimeError("odd"), "feature"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_source_that_fails_costs_its_own_numbers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, error, name = FAILURES[case]
    monitor = RankMonitor(
        ("gradients", "updates", "features"), ("stable_rank",), every_n_steps=1, per_site=True, detail="all"
    )
    monkeypatch.setattr(owner, method, failing(getattr(owner, method), error, on_call=3))

    with pytest.warns(UserWarning, match=f"{name}: no number for 2 of 2 sites.*{error}") as caught:
        logger = watched_as_unwatched(Classifier, monitor)

    assert len(ours(caught)) == 1
    assert monitor.failures == 2
    curves = {tag: curve for tag, curve in logger.curves().items() if "_stable_rank/" in tag}
    assert len(curves) == 6
    for tag, curve in curves.items():
        assert missing(curve) == ([2] if tag.startswith(name) else [])


def test_a_layer_whose_output_cannot_be_read_costs_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = RankMonitor(("gradients", "features"), ("stable_rank",), every_n_steps=1, per_site=True, detail="all")
    monkeypatch.setattr(features, "rows_of", failing(features.rows_of, RuntimeError("odd"), on_call=5))

    with pytest.warns(
        UserWarning, match="feature: no number for 1 of 2 sites, the first is 'net.0.out'.*odd"
    ) as caught:
        logger = watched_as_unwatched(Classifier, monitor)

    assert len(ours(caught)) == 1
    assert missing(logger.curve("feature_stable_rank/net.0.out")) == [2]
    assert missing(logger.curve("feature_stable_rank/net.2.out")) == missing(logger.curve(FAULTY)) == []


def test_rows_of_a_sample_that_failed_do_not_count_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda: RankMonitor(("features",), ("stable_rank",), every_n_steps=1, per_site=True, detail="all")  # noqa: E731
    tag = "feature_stable_rank/net.0.out"
    sound = watched_as_unwatched(Classifier, make())
    monkeypatch.setattr(Features, "sample_over", failing(Features.sample_over, RuntimeError("odd"), on_call=3))

    with pytest.warns(UserWarning, match="odd"):
        logger = watched_as_unwatched(Classifier, make())

    assert {**logger.curve(tag), 2: 0.0} == {**sound.curve(tag), 2: 0.0}


def test_a_sample_that_is_lost_leaves_nothing_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = watched_as_unwatched(Classifier, gradient_monitor())
    monkeypatch.setattr(Sampling, "report", failing(Sampling.report, RuntimeError("odd"), on_call=3))

    with pytest.warns(UserWarning, match="RuntimeError: odd; this sample is lost"):
        logger = watched_as_unwatched(Classifier, gradient_monitor())

    expected = {step: value for step, value in sound.curve(FAULTY).items() if step != 2}
    assert logger.curve(FAULTY) == expected


# Runs that end early


class Interrupted(Classifier):
    """Raises in the third training step."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self(batch[0])
        if batch_idx == 2:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Lightning turns Ctrl-C off when it has been pressed."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def ended_early(module: Classifier, expected: type[BaseException]) -> tuple[L.Trainer, Monitor]:
    """A watched run that does not come to its end."""
    monitor = RankMonitor(EVERYTHING, every_n_steps=1, detail="all")
    settings = {
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(**settings, logger=MemoryLogger(), callbacks=[monitor])
    with pytest.raises(expected):
        trainer.fit(module)
    return trainer, monitor


def assert_nothing_is_left(module: Classifier, trainer: L.Trainer, monitor: Monitor) -> None:
    """No hook on a module or an optimizer, and no tensor of a sample in the making."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(layer, kind) for layer in module.modules() for kind in kinds)
    assert len(trainer.optimizers) == 1
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
    for recorder in monitor.recorders:
        assert not recorder._staged
        assert not recorder.means.update_called
        assert not any(getattr(recorder.probe.source, held, None) for held in ("_before", "_grams", "_hooks"))


@pytest.mark.parametrize("error", [ValueError("the user's own"), KeyboardInterrupt()], ids=["ValueError", "Ctrl-C"])
def test_an_error_of_the_user_gets_through_and_no_hook_is_left(error: BaseException, interrupts: None) -> None:
    module = Interrupted(error)

    trainer, monitor = ended_early(module, SystemExit if isinstance(error, KeyboardInterrupt) else ValueError)

    assert_nothing_is_left(module, trainer, monitor)


OUR_MOMENTS: dict[str, tuple[Any, str]] = {
    "in the optimizer's step": (torch.optim.AdamW, "step"),
    "while gradients are read": (Gradients, "gradients_final"),
    "after the step": (Updates, "step_done"),
    "in the forward hook": (features, "rows_of"),
    "in the report": (Sampling, "report"),
}


@pytest.mark.parametrize("moment", OUR_MOMENTS)
def test_ctrl_c_leaves_nothing_behind(moment: str, monkeypatch: pytest.MonkeyPatch, interrupts: None) -> None:
    owner, name = OUR_MOMENTS[moment]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), KeyboardInterrupt(), on_call=3))
    module = Classifier()

    trainer, monitor = ended_early(module, SystemExit)

    assert_nothing_is_left(module, trainer, monitor)


def test_training_goes_on_after_an_interruption_as_if_nothing_had_been(interrupts: None) -> None:
    module = Interrupted(KeyboardInterrupt())
    _, monitor = ended_early(module, SystemExit)
    settings = {
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    logger, again = MemoryLogger(), Classifier()

    L.Trainer(**settings, logger=logger, callbacks=[monitor]).fit(again)

    assert list(logger.curve("rank/gradient_stable_rank_median"))[-1] == 7


# What a source is asked for in a training.
ASKED = ["batch_begins", "gradients_final", "step_done", "batch_over", "sample_over", "numbers", "note", "state_dict"]


@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
@pytest.mark.parametrize("asked", ASKED)
def test_whatever_a_source_fails_at_training_goes_on_and_it_is_told(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: Any, **__: Any) -> Any:
        raise RuntimeError("odd")

    monitors = {name: make(every_n_steps=2) for name, make in MONITORS.items()}
    sources = {name: [r.probe.source for r in monitor.recorders] for name, monitor in monitors.items()}
    with_it = {name for name, its in sources.items() if any(hasattr(source, asked) for source in its)}
    assert with_it
    for source in (source for name in with_it for source in sources[name] if hasattr(source, asked)):
        monkeypatch.setattr(source, asked, odd, raising=False)

    _, alone = logged([])
    _, module = logged(list(monitors.values()))

    torch.testing.assert_close(module.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert module.losses == alone.losses
    lost = {name for name, monitor in monitors.items() if monitor.failures}
    assert lost or asked == "state_dict"


@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
@pytest.mark.parametrize("part", ["batch_begins", "gradients_final", "batch_over", "report"])
def test_whatever_fails_in_taking_a_sample_training_goes_on(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(*_: Any, **__: Any) -> Any:
        raise RuntimeError("odd")

    _, alone = logged([])
    monkeypatch.setattr(Sampling, part, odd)

    _, module = logged([make(every_n_steps=2) for make in MONITORS.values()])

    torch.testing.assert_close(module.state_dict(), alone.state_dict(), rtol=0, atol=0)
