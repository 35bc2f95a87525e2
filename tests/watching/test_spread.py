"""Decompositions spread over batches: the numbers of a sample that is measured at once, at its step, a little later."""

from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_lowrank import Alert, AlertError, RankMonitor
from lightning_lowrank.monitors.rank import SOURCES
from tests.processes import together
from tests.trainings import InOrder, MemoryLogger, Validated, fitted, logged, mlp

matrices = import_module("lightning_lowrank.measuring.matrix_recorder")

STATISTICS = ("effective_rank", "energy_rank", "stable_rank", "subspace_overlap", "weight_ratio")
STEPS = {"max_epochs": 2, "max_steps": -1, "num_sanity_val_steps": 0}
FIRST = "rank/gradient_stable_rank_median"


class Deep(Validated):
    """Eight batches an epoch, three layers of one size."""

    def __init__(self) -> None:
        layers = [nn.Linear(64, 64) for _ in range(3)]
        super().__init__(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]))


def monitor(spread: int, **options: Any) -> RankMonitor:
    usual: dict[str, Any] = {"every_n_steps": 5, "per_site": True, "detail": "all", "alerts": None}
    return RankMonitor(tuple(SOURCES), STATISTICS, **usual | options, spread=spread)


def curves(spread: int, every_n_steps: int) -> dict[str, dict[int, float]]:
    logger, _ = logged([monitor(spread, every_n_steps=every_n_steps)], Deep, **STEPS)
    numbers = logger.numbers()
    return {tag: numbers[tag] for tag in numbers if not tag.endswith("solver_calls")}


class Watching(L.Callback):
    """The step of the latest number that ModelCheckpoint could see after each batch, and the calls of the solver."""

    def __init__(self, logger: MemoryLogger, calls: list[Any]) -> None:
        self.logger, self.calls = logger, calls
        self.known: list[int] = []
        self.solved: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.known.append(max((step for step, row in self.logger.rows if FIRST in row), default=-1))
        self.solved.append(len(self.calls))
        self.calls.clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What went to the eigensolver: one entry per matrix."""
    solved: list[Any] = []
    solve = torch.linalg.eigvalsh

    def counted(symmetric: torch.Tensor, **options: Any) -> torch.Tensor:
        solved.extend([None] * symmetric.shape[:-2].numel())
        return solve(symmetric, **options)

    monkeypatch.setattr(torch.linalg, "eigvalsh", counted)
    return solved


def seen(calls: list[Any], **options: Any) -> tuple[Watching, RankMonitor]:
    logger = MemoryLogger()
    watching = RankMonitor(**{"every_n_steps": 4, "alerts": None, "spread": 3} | options)
    keep = Watching(logger, calls)
    logged([watching, keep], Deep, logger=logger, max_steps=8)
    return keep, watching


@pytest.mark.parametrize(("spread", "every_n_steps"), [(3, 1), (1, 2), (20, 3), (3, 7)])
def test_the_numbers_and_their_steps_are_those_of_a_sample_measured_at_once(spread: int, every_n_steps: int) -> None:
    found, expected = curves(spread, every_n_steps), curves(0, every_n_steps)

    assert len(expected) > 100
    assert {tag: list(curve) for tag, curve in found.items()} == {tag: list(c) for tag, c in expected.items()}
    for tag in expected:
        numbers = (torch.tensor(list(c[tag].values()), dtype=torch.float64) for c in (found, expected))
        assert_close(*numbers, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_numbers_come_as_many_batches_later_as_was_asked_for(calls: list[Any]) -> None:
    keep, _ = seen(calls)

    assert keep.known == [-1, -1, -1, 0, 0, 0, 0, 4]


def test_no_batch_decomposes_more_than_its_share(calls: list[Any]) -> None:
    keep, _ = seen(calls)

    assert keep.solved == [0, 3, 3, 3] * 2


@pytest.mark.parametrize("what", ["latest", "first"])
def test_who_asks_sooner_gets_them(what: str, calls: list[Any]) -> None:
    class Asking(L.Callback):
        found: list[int]

        def on_train_batch_end(self, *_: Any) -> None:
            self.found = [*getattr(self, "found", []), getattr(watching, what).step]

    asking, watching = Asking(), RankMonitor(every_n_steps=2, alerts=None, spread=9)
    logged([watching, asking], Deep, max_steps=4)

    assert asking.found == ([0, 0, 2, 2] if what == "latest" else [0] * 4)


def test_what_takes_more_memory_than_is_kept_is_decomposed_at_once(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "KEPT", 1)
    keep, _ = seen(calls)

    assert keep.solved == [9, 0, 0, 0] * 2


def test_a_budget_measures_samples_that_are_not_spread(calls: list[Any]) -> None:
    keep, _ = seen(calls, every_n_steps=None, max_overhead=0.01)

    assert keep.solved == [9, *[0] * 7]


def test_an_exception_between_leaves_the_numbers() -> None:
    class Failing(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise RuntimeError("in the user's own code")
            return super().training_step(batch, batch_idx)

    logger, watching = MemoryLogger(), monitor(5)
    with pytest.raises(RuntimeError, match="own code"):
        logged([watching], Failing, logger=logger)

    assert [step for step, _ in logger.rows] == [0] and watching.latest is not None


@pytest.mark.parametrize(("spread", "raised"), [(0, 1), (2, 3), (50, 4)])
def test_alerts_act_with_the_last_decomposition_or_at_the_end(spread: int, raised: int) -> None:
    alert = Alert("gradient_stable_rank", above=0.0, for_samples=1, warm_up_samples=0, actions=("raise",))
    watching = RankMonitor("gradients", alerts=[alert], spread=spread)
    module = Deep()
    with pytest.raises(AlertError, match="gradient_stable_rank"):
        logged([watching], lambda: module)

    assert len(module.losses) == raised and watching.events[0].step == 0


def two(rank: int, size: int, root: Path) -> Any:
    L.seed_everything(0, verbose=False)
    logger = MemoryLogger()
    fitted(InOrder(rank, size, mlp(32), 16), [monitor(3, every_n_steps=2)], logger, size)
    return logger.numbers()


@pytest.mark.slow
def test_several_processes_share_decompositions_out_instead(tmp_path: Path) -> None:
    (numbers, _), expected = together(two, tmp_path), two(0, 1, tmp_path)

    curve = "gradient_effective_rank/net.0.weight"
    assert_close(list(numbers[curve].values()), list(expected[curve].values()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("spread", [-1, True, 1.5])
def test_other_than_a_number_of_batches_is_refused(spread: Any) -> None:
    with pytest.raises(ValueError, match="spread"):
        RankMonitor(spread=spread)
