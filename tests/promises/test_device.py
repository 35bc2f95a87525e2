"""Everything stays on the tensor's device until a report is moved, all of it at once."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_lowrank import RankMonitor
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.maths.spectra.subspaces import Subspace, top_subspace
from lightning_lowrank.measuring.matrix_recorder import MatrixRecorder
from lightning_lowrank.measuring.probe import Probe
from lightning_lowrank.measuring.recorder import BATCH
from lightning_lowrank.measuring.source import Batch, Source, Step
from lightning_lowrank.measuring.sources.displacement import Displacement
from lightning_lowrank.measuring.sources.features import Features
from lightning_lowrank.measuring.sources.gradients import Gradients
from lightning_lowrank.measuring.sources.optimizer_state import OptimizerState
from lightning_lowrank.measuring.sources.updates import Updates
from lightning_lowrank.measuring.sources.weights import Weights
from lightning_lowrank.statistics import available, find
from lightning_lowrank.watching.loops import LoopTraining
from lightning_lowrank.watching.watch import Watch
from tests.dispatch import Waits, within_monitors
from tests.monitors import MONITORS
from tests.trainings import Attending, Classifier, MemoryLogger, logged

EVERYTHING = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features")
STATISTICS = ("energy_rank", "stable_rank", "effective_rank", "participation_ratio", "subspace_overlap", "weight_ratio")


def test_a_report_is_moved_at_once_and_nothing_else_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, moved, ours, guard = Waits("cpu"), Counter[str](), list[bool](), Watch._guard

    @contextmanager
    def watched(self: Watch, **options: bool) -> Iterator[None]:
        ours.append(True)
        try:
            with guard(self, **options), waits:
                yield
        finally:
            ours.pop()

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def wrapper(tensor: Tensor, *args: Any) -> Any:
            moved[name] += bool(ours)
            return method(tensor, *args)

        return wrapper

    monitor, logger = RankMonitor(EVERYTHING, STATISTICS, every_n_steps=2, per_site=True, detail="all"), MemoryLogger()
    monkeypatch.setattr(Watch, "_guard", watched)
    for name in ("cpu", "numpy", "tolist", "item"):
        monkeypatch.setattr(Tensor, name, counted(name))

    settings = {
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(**settings, logger=logger, callbacks=[monitor]).fit(Classifier())

    num_reports = len(logger.curve("lowrank/rank_failures"))
    assert num_reports == 4
    assert +moved == {"cpu": num_reports, "numpy": num_reports}
    assert waits.seen == {}


class Silent(Classifier):
    """Reads no number of its own, so that a replay of its step reads none."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


# Numbers that are read from the device in a sample, beside the report: by curvature one of each forward pass of its
# search along the update, and one more.
READ = {"curvature": 8, "ntk": 2, "anatomy": 40}


@pytest.mark.parametrize("name", MONITORS)
def test_a_sample_of_any_monitor_waits_no_more_than_is_known(name: str) -> None:
    waits = Waits("cpu")
    monitor = MONITORS[name](every_n_steps=2)

    with within_monitors(waits):
        logger, _ = logged([monitor], lambda: Silent(Attending()))

    assert logger.numbers() and monitor.failures == 0
    assert waits.seen.total() <= 2 * READ.get(name, 0), waits.seen


# On the device "meta", which has shapes and no numbers: to ask for one raises, and nothing comes back from it.


@pytest.fixture
def waits() -> Iterator[Waits]:
    """What makes the host wait."""
    with Waits("meta") as counting:
        yield counting


def batch_of_matrices() -> list[Tensor]:
    """Of shapes that share a solver call, and shapes that do not."""
    return [torch.empty(*shape, device="meta") for shape in ((8, 6), (6, 8), (2, 6, 7), (16, 16))]


@pytest.mark.parametrize("needs", ["moments", "top", "values"])
def test_spectra_stay_on_their_device(needs: Any, waits: Waits) -> None:
    spectra = decompose(batch_of_matrices(), needs).spectra

    assert {tensor.device.type for s in spectra for tensor in (s.values, s.weights, s.energy)} == {"meta"}
    assert waits.seen == {}


@pytest.mark.parametrize("name", available())
def test_statistics_stay_on_their_device(name: str, waits: Waits) -> None:
    statistic = find(name)
    matrix = torch.empty(3, 8, 6, device="meta")
    value_objects: dict[type, Callable[[], object]] = {
        Spectrum: lambda: decompose([matrix], "values").spectra[0],
        Subspace: lambda: top_subspace(matrix, 2),
        Scaling: lambda: rank_scaling(matrix),
    }

    result = statistic(*(value_objects[kind]() for kind in statistic.takes))

    assert (result.device.type, result.shape) == ("meta", (3,))
    assert waits.seen == {}


SOURCES: dict[str, tuple[Callable[[], Source], tuple[str, ...]]] = {
    "gradient": (Gradients, STATISTICS),
    "weight": (Weights, STATISTICS[:5]),
    "update": (Updates, STATISTICS),
    "displacement": (Displacement, STATISTICS),
    "first_moment": (OptimizerState, STATISTICS[:5]),
    "feature": (Features, STATISTICS[:4]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_sample_stays_on_its_device_from_the_source_to_the_report(name: str, waits: Waits) -> None:
    make, statistics = SOURCES[name]
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).to("meta")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    recorder, generator = MatrixRecorder(Probe(name, make(), statistics)), torch.Generator("cpu")
    waits.seen.clear()

    for _ in range(2):
        report = sampled(recorder, module, optimizer, generator)

    assert recorder.error is None
    assert {tensor.device.type for tensor in report.values()} == {"meta"}
    assert waits.seen == {}


def sampled(
    recorder: MatrixRecorder, module: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    """One step of training with a sample taken."""
    source, step = recorder.probe.source, Step(optimizer, frozenset(map(id, module.parameters())))
    recorder.plan(LoopTraining(module))
    source.batch_begins(Batch(LoopTraining(module), None, 0, 0))
    module(torch.empty(5, 6, device="meta")).sum().backward()
    recorder.gradients_final(0, step, generator, Team())
    optimizer.step()
    recorder.step_done(0, step, generator, Team())
    recorder.commit(0)
    source.batch_over()
    recorder.sample_over(generator, Team())
    recorder.commit(BATCH)
    return recorder.report()
