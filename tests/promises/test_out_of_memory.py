"""Memory that runs out while a monitor measures: it tries smaller parts, then does without the number, and holds on to
nothing.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_lowrank import Features, Monitor, RankMonitor
from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.maths.spectra.subspaces import top_subspace, top_subspaces
from lightning_lowrank.monitors.rank import OF_LAYERS, OF_PARAMETERS, SOURCES
from tests.dispatch import SMALL, Scarce, within_monitors
from tests.monitors import MONITORS
from tests.trainings import Classifier, MemoryLogger, Validated, logged

STEPS, STRIDE, SHORT = 24, 61, (2, 3, 4)
# Bytes of a Gram matrix of 128 x 128.
LARGE = 131072


@contextmanager
def scarce_for_monitors(mode: Scarce) -> Iterator[None]:
    """What monitors do is done with little memory, what the user does is not."""
    add = Features._add

    def added(*args: Any) -> None:
        with mode:
            add(*args)

    with pytest.MonkeyPatch.context() as patch, within_monitors(mode):
        patch.setattr(Features, "_add", added)
        yield


class Shortage(L.Callback):
    """In three of the steps a monitor is refused some memory.

    Args:
        refuses: Bytes in use, and those of one more tensor -> whether it is refused.
    """

    def __init__(self, refuses: Callable[[int, int], bool]) -> None:
        self.refuses, self.mode = refuses, Scarce(self._refuses)
        self.short, self.num_refused = False, 0
        self.left: list[int] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.short = trainer.global_step in SHORT

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what is left of what the monitor took; it comes first, where callbacks are called in the order of the
        list.
        """
        self.left.append(self.mode.in_use())

    def _refuses(self, number: int, size: int) -> bool:
        refused = self.short and size >= SMALL and self.refuses(self.mode.in_use(), size)
        self.num_refused += refused
        return refused


class OneAfterTheOther(L.Callback):
    """At each step another allocation of the monitor fails, and no other."""

    def __init__(self) -> None:
        self.refused = -1
        self.mode = Scarce(lambda number, _: number == self.refused)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.mode.count, self.refused = 0, trainer.global_step * STRIDE


def wide() -> Classifier:
    """Twelve layers of 64 x 64 that are decomposed together, and one of 128 x 128 that is alone."""
    layers = {f"small{i}": nn.Linear(64, 64) for i in range(12)}
    between = {"widen": nn.ZeroPad1d((0, 64)), "large": nn.Linear(128, 128), "head": nn.Linear(128, 10)}
    return Validated(nn.Sequential(OrderedDict(layers | between)))


def trained(
    steps: int, *callbacks: L.Callback, make: Callable[[], L.LightningModule] = wide
) -> tuple[Any, MemoryLogger, list[str]]:
    """Final weights and the generator's state, what was logged, and what this package warned of."""
    L.seed_everything(3, verbose=False)
    logger, module = MemoryLogger(), make()
    options = {
        "max_steps": steps,
        "val_check_interval": 1,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "lightning_lowrank")
        L.Trainer(**options, **quiet, logger=logger, callbacks=list(callbacks)).fit(module)
    bits = module.state_dict() | {"generator": torch.get_rng_state()}
    return bits, logger, [str(w.message) for w in caught if str(w.message).startswith("lightning_lowrank")]


def watching(*sources: str) -> Monitor:
    """At every step and site."""
    of_vectors = ("subspace_overlap",) if set(sources) & set(OF_PARAMETERS) else ()
    return RankMonitor(
        sources, ("effective_rank", "stable_rank", *of_vectors), every_n_steps=1, per_site=True, detail="all"
    )


def curves(logger: MemoryLogger) -> dict[str, dict[int, float]]:
    """Those of single sites."""
    return {tag: curve for tag, curve in logger.curves().items() if not tag.startswith("lowrank/") and "_rank/" in tag}


@pytest.mark.slow
def test_whatever_allocation_fails_training_is_the_same_and_what_is_logged_is_true() -> None:
    alone, _, _ = trained(STEPS, make=Validated)
    _, sound, _ = trained(STEPS, watching(*SOURCES), make=Validated)
    shortage = OneAfterTheOther()

    with scarce_for_monitors(shortage.mode):
        bits, logger, _ = trained(STEPS, shortage, watching(*SOURCES), make=Validated)

    torch.testing.assert_close(bits, alone, rtol=0, atol=0)
    truth = curves(sound)
    logged = {
        tag: {step: value for step, value in curve.items() if not np.isnan(value)}
        for tag, curve in curves(logger).items()
    }
    torch.testing.assert_close(
        logged, {tag: {step: truth[tag][step] for step in curve} for tag, curve in logged.items()}, rtol=1e-6, atol=0
    )


class InFewSteps(OneAfterTheOther):
    """The same, spread over all the allocations of a sample; the first step and the last have all memory."""

    def __init__(self, stride: int, last: int) -> None:
        super().__init__()
        self.stride, self.last, self.num_refused = stride, last, 0
        self.mode = Scarce(self._refuses)

    def _refuses(self, number: int, size: int) -> bool:
        self.num_refused += number == self.refused
        return number == self.refused

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.mode.count, self.refused = 0, step * self.stride if 0 < step < self.last else -1


def finite(logger: MemoryLogger, step: int) -> set[str]:
    """Tags that have a number at a step."""
    return {tag for tag, curve in logger.numbers().items() if np.isfinite(curve.get(step, np.nan))}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
@pytest.mark.parametrize("name", MONITORS)
def test_whatever_allocation_of_any_monitor_fails_training_is_the_same_and_the_next_sample_is_whole(name: str) -> None:
    counting, num_steps = InFewSteps(0, 0), 5
    logged([MONITORS[name](every_n_steps=1)], max_steps=1)  # tables that are made once
    with within_monitors(counting.mode):
        logged([counting, MONITORS[name](every_n_steps=1)], max_steps=1)
    shortage, monitor = InFewSteps(max(1, counting.mode.count // num_steps), num_steps), MONITORS[name](every_n_steps=1)

    with within_monitors(shortage.mode):
        logger, module = logged([shortage, monitor], max_steps=num_steps + 1)
    _, alone = logged([], max_steps=num_steps + 1)

    torch.testing.assert_close(module.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert module.losses == alone.losses
    assert counting.mode.count > num_steps
    assert shortage.num_refused >= num_steps - 2
    # All but what needs more than one sample before it.
    assert len(finite(logger, num_steps) & finite(logger, 0)) >= 0.9 * len(finite(logger, 0)) > 0


@pytest.fixture(scope="module")
def sound() -> dict[str, dict[int, float]]:
    """What a monitor logs that has all memory."""
    return curves(trained(6, watching(*SOURCES))[1])


@pytest.mark.parametrize("source", OF_PARAMETERS)
def test_what_does_not_fit_together_is_measured_one_by_one(source: str, sound: dict[str, dict[int, float]]) -> None:
    monitor = watching(source)
    shortage = Shortage(lambda in_use, size: in_use + size > 1_500_000)

    with scarce_for_monitors(shortage.mode):
        _, logger, warned = trained(6, monitor, shortage)

    assert shortage.num_refused
    assert (monitor.failures, warned) == (0, [])
    logged = curves(logger)
    torch.testing.assert_close(logged, {tag: sound[tag] for tag in logged}, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("source", SOURCES)
def test_a_matrix_that_does_not_fit_alone_is_done_without(source: str, sound: dict[str, dict[int, float]]) -> None:
    monitor, shortage = watching(source), Shortage(lambda _, size: size >= LARGE)

    with scarce_for_monitors(shortage.mode):
        bits, logger, warned = trained(6, monitor, shortage)

    logged = curves(logger)
    torch.testing.assert_close(bits, trained(6)[0], rtol=0, atol=0)
    torch.testing.assert_close(
        logged, {tag: _without(tag, sound[tag]) for tag in logged}, rtol=1e-5, atol=0, equal_nan=True
    )
    # What was not heard at all counts once, however long that lasts.
    assert monitor.failures == (len(SHORT) if source in OF_PARAMETERS else 1) * len(monitor.recorders)
    assert len(warned) == len(monitor.recorders)


def _without(tag: str, curve: dict[int, float]) -> dict[int, float]:
    """What is left of a curve of the large layer; its subspace cannot be compared with the one before where there is
    none.
    """
    lost = (*SHORT, max(SHORT) + 1) if "overlap" in tag or "drift" in tag else SHORT
    return curve | (dict.fromkeys(lost, np.nan) if "/net.large." in tag else {})


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_more_is_held_than_after_a_sound_sample(source: str) -> None:
    shortage = Shortage(lambda _, size: size >= LARGE)

    with scarce_for_monitors(shortage.mode):
        trained(6, watching(source), shortage)

    assert max(shortage.left) <= shortage.left[1]


@pytest.mark.parametrize("source", OF_LAYERS)
def test_nothing_of_pooled_outputs_is_held(source: str) -> None:
    nobody_is_short = Shortage(lambda in_use, size: False)

    with scarce_for_monitors(nobody_is_short.mode):
        trained(6, watching(source), nobody_is_short)

    assert nobody_is_short.left == [0] * 6


# What a batch that is taken apart leaves to its parts


def test_a_batch_that_failed_has_let_go_of_its_memory_when_its_parts_are_tried(generator: torch.Generator) -> None:
    matrices = list(torch.randn(8, 64, 64, generator=generator))
    expected = decompose(matrices, "values").spectra
    room = 8 * 64 * 64 * 8 + 16384  # for the Gram matrices together, not for what they are made in
    mode = Scarce(lambda _, size: mode.in_use() + size > room)

    with mode:
        found = decompose(matrices, "values").spectra

    torch.testing.assert_close([s.values for s in found], [s.values for s in expected], rtol=1e-6, atol=1e-6)


def test_a_stack_that_is_one_reading_is_taken_apart_too(generator: torch.Generator) -> None:
    experts = torch.randn(2, 4, 64, 64, generator=generator)
    expected = decompose([experts], "values").spectra[0]
    mode = Scarce(lambda _, size: mode.in_use() + size > 100_000)

    with mode:
        found = decompose([experts], "values").spectra[0]

    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1e-6)


def test_subspaces_are_found_one_by_one_where_they_must(generator: torch.Generator) -> None:
    matrices = list(torch.randn(8, 2, 64, 64, generator=generator))
    expected = top_subspaces(matrices, 4)
    mode = Scarce(lambda _, size: mode.in_use() + size > 350_000)

    with mode:
        found = top_subspaces(matrices, 4)

    torch.testing.assert_close(found.values, expected.values)


def test_a_subspace_that_cannot_be_had_is_nan_and_the_others_are_not(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = torch.randn(3, 6, 8, generator=generator)
    matrices[1] *= 1000
    solve = torch.linalg.eigh

    def small_only(gram: Tensor) -> tuple[Tensor, Tensor]:
        if gram.abs().max() > 10000:
            raise torch.OutOfMemoryError("out of memory")
        return solve(gram)

    monkeypatch.setattr(torch.linalg, "eigh", small_only)

    found = top_subspaces([matrices], 2)

    assert found.basis.shape == (3, 6, 2)
    assert torch.isnan(found.values).all(-1).tolist() == [False, True, False]


def test_a_subspace_does_not_keep_the_vectors_that_it_left_out(generator: torch.Generator) -> None:
    basis = top_subspace(torch.randn(64, 64, generator=generator), 4).basis

    assert basis.untyped_storage().nbytes() == 64 * 4 * 8
