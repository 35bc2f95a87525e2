"""A run that was stopped and resumed has the curves of one that never stopped."""

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from lightning_lowrank import Monitor, RankMonitor
from tests.monitors import MONITORS, VARIANTS
from tests.trainings import Adversaries, Attending, Ordered, Resumable, digits

# The second run needs no ModelCheckpoint, and some of them have other monitors.
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")

SOURCES = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features", "validation_features")
STATISTICS = ("effective_rank", "spectrum_drift", "subspace_overlap", "weight_ratio")
COSTS = ("time_ms", "overhead_percent")

Curves = dict[str, list[tuple[int, float]]]


class InTurn(Adversaries):
    """Two optimizers, four batches an epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(32), batch_size=8)


def monitor(sources: Sequence[str] = SOURCES, statistics: Sequence[str] = STATISTICS, **options: Any) -> Monitor:
    """Everything there is, at a cadence that does not divide the epoch."""
    return RankMonitor(sources, statistics, **{"every_n_steps": 3, "per_site": True} | options, detail="all")


def trained(
    root: Path,
    callbacks: Sequence[L.Callback],
    make: Callable[[], L.LightningModule] = Ordered,
    *,
    resume: Path | None = None,
    **options: Any,
) -> L.LightningModule:
    """A run of at most four epochs that logs to a CSV file."""
    L.seed_everything(3, verbose=False)
    module = make()
    settings = {"max_epochs": 4, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    L.Trainer(
        **settings | options,
        logger=CSVLogger(root, flush_logs_every_n_steps=1),
        enable_checkpointing=keeps,
        callbacks=list(callbacks),
    ).fit(module, ckpt_path=resume)
    return module


def read(*roots: Path) -> Curves:
    """All curves of the monitors in the CSV files of some runs, our own cost aside."""
    curves: Curves = {}
    for root in roots:
        (path,) = root.rglob("metrics.csv")
        with path.open() as file:
            for row in csv.DictReader(file):
                for tag, value in row.items():
                    if value and "/" in tag and not tag.endswith(COSTS):
                        curves.setdefault(tag, []).append((int(row["step"]), float(value)))
    return curves


def assert_same_curves(found: Curves, expected: Curves) -> None:
    """Equal bit for bit, NaN where the other has NaN."""
    assert found.keys() == expected.keys()
    for tag in expected:
        assert [step for step, _ in found[tag]] == [step for step, _ in expected[tag]], tag
        ours, theirs = (torch.tensor([value for _, value in curve[tag]]) for curve in (found, expected))
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda message, tag=tag: f"{tag}: {message}"
        )


def saved(root: Path) -> Path:
    """The one checkpoint of a run."""
    (path,) = root.rglob("*.ckpt")
    return path


MODULES = {"one optimizer": Ordered, "two optimizers by hand": InTurn}


@pytest.mark.parametrize("case", MODULES)
def test_a_run_stopped_between_epochs_and_resumed_has_the_curves_of_one_that_never_stopped(
    case: str, tmp_path: Path
) -> None:
    sources = SOURCES if case == "one optimizer" else SOURCES[:-1]
    trained(tmp_path / "whole", [monitor(sources)], MODULES[case])

    trained(
        tmp_path / "first", [monitor(sources), ModelCheckpoint(tmp_path / "checkpoints")], MODULES[case], max_epochs=2
    )
    trained(tmp_path / "second", [monitor(sources)], MODULES[case], resume=saved(tmp_path / "checkpoints"))

    expected = read(tmp_path / "whole")
    assert "displacement_subspace_overlap/" in " ".join(expected)
    assert_same_curves(read(tmp_path / "first", tmp_path / "second"), expected)


def attending() -> L.LightningModule:
    """A model that every monitor can watch."""
    return Ordered(Attending())


def with_all() -> list[Monitor]:
    return [make(every_n_steps=3) for make in (MONITORS | VARIANTS).values()]


@pytest.mark.filterwarnings("ignore:lightning_lowrank classes_representation.* no number")  # a batch of single classes
def test_with_any_monitor_a_resumed_run_has_the_curves_of_one_that_never_stopped(tmp_path: Path) -> None:
    trained(tmp_path / "whole", with_all(), attending, max_epochs=3)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=5)

    trained(tmp_path / "first", [*with_all(), checkpoint], attending, max_steps=5)
    trained(tmp_path / "second", with_all(), attending, resume=saved(tmp_path / "checkpoints"), max_epochs=3)

    assert_same_curves(read(tmp_path / "first", tmp_path / "second"), read(tmp_path / "whole"))


@pytest.mark.parametrize("name", MONITORS | VARIANTS)
def test_the_state_of_any_monitor_is_plain_and_goes_into_another(name: str, tmp_path: Path) -> None:
    watching, other = ((MONITORS | VARIANTS)[name](every_n_steps=2) for _ in range(2))
    trained(tmp_path / "run", [watching], attending, max_epochs=1)
    torch.save(watching.state_dict(), tmp_path / "state.pt")

    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    assert all(plain(watching.state_dict()))
    assert same(other.state_dict()["probes"], watching.state_dict()["probes"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Curves:
    """The curves of a run that never stopped."""
    root = tmp_path_factory.mktemp("whole")
    trained(root, [monitor()])
    return read(root)


@pytest.mark.parametrize("stop", [1, 3, 6, 8])
def test_a_run_resumed_from_any_step_doubles_no_point_and_loses_none(stop: int, whole: Curves, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=stop)

    trained(tmp_path / "first", [monitor(), checkpoint], max_steps=stop)
    trained(tmp_path / "second", [monitor()], resume=saved(tmp_path / "checkpoints"))

    assert_same_curves(read(tmp_path / "first", tmp_path / "second"), whole)


def test_accumulated_batches_are_resumed_too(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2}
    trained(tmp_path / "whole", [monitor(every_n_steps=1)], **options)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=3)

    trained(tmp_path / "first", [monitor(every_n_steps=1), checkpoint], max_steps=3, **options)
    trained(tmp_path / "second", [monitor(every_n_steps=1)], resume=saved(tmp_path / "checkpoints"), **options)

    assert_same_curves(read(tmp_path / "first", tmp_path / "second"), read(tmp_path / "whole"))


@pytest.mark.parametrize("stop", [1, 4])
def test_a_sample_that_is_not_decomposed_yet_is_in_the_checkpoint(stop: int, tmp_path: Path) -> None:
    trained(tmp_path / "whole", [monitor(spread=2)], max_epochs=3)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=stop)

    trained(tmp_path / "first", [monitor(spread=2), checkpoint], max_steps=stop)
    trained(tmp_path / "second", [monitor(spread=2)], resume=saved(tmp_path / "checkpoints"), max_epochs=3)

    assert_same_curves(read(tmp_path / "first", tmp_path / "second"), read(tmp_path / "whole"))


def plain(value: Any) -> Iterator[bool]:
    """Whether each leaf is a tensor, a number or a word."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield isinstance(key, str)
            yield from plain(part)
    elif isinstance(value, list):
        for part in value:
            yield from plain(part)
    else:
        yield isinstance(value, torch.Tensor | int | float | str | None)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal bit for bit."""
    return repr(bare(one)) == repr(bare(other))


def bare(value: Any) -> Any:
    """Arrays and their types in the place of tensors."""
    if isinstance(value, dict):
        return {key: bare(part) for key, part in value.items()}
    if isinstance(value, list):
        return list(map(bare, value))
    return (str(value.dtype), value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def test_the_state_is_plain_tensors_numbers_and_words(tmp_path: Path) -> None:
    watching = monitor()
    trained(tmp_path, [watching])

    torch.save(watching.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)

    assert all(plain(watching.state_dict()))
    assert same(loaded, watching.state_dict())


def test_the_state_belongs_to_the_checkpoint_not_to_the_run(tmp_path: Path) -> None:
    watching = monitor()
    trained(tmp_path / "first", [watching], max_epochs=1)
    kept = torch.load(_write(watching, tmp_path), weights_only=True)

    other = monitor()
    other.load_state_dict(kept)
    trained(tmp_path / "second", [other], max_epochs=2)

    assert same(kept, torch.load(tmp_path / "state.pt", weights_only=True))


def _write(watching: Monitor, root: Path) -> Path:
    torch.save(watching.state_dict(), root / "state.pt")
    return root / "state.pt"


def test_a_checkpoint_written_without_a_monitor_resumes_with_one(tmp_path: Path) -> None:
    trained(tmp_path / "first", [ModelCheckpoint(tmp_path / "checkpoints")], max_epochs=2)

    trained(tmp_path / "second", [monitor()], resume=saved(tmp_path / "checkpoints"))

    assert [step for step, _ in read(tmp_path / "second")["rank/gradient_effective_rank_median"]] == [9, 12, 15]


def test_a_checkpoint_written_with_a_monitor_resumes_without_one(tmp_path: Path) -> None:
    alone = trained(tmp_path / "whole", [])

    trained(tmp_path / "first", [monitor(), ModelCheckpoint(tmp_path / "checkpoints")], max_epochs=2)
    resumed = trained(tmp_path / "second", [], resume=saved(tmp_path / "checkpoints"))

    torch.testing.assert_close(resumed.state_dict(), alone.state_dict(), rtol=0, atol=0)


CHANGES: dict[str, Monitor] = {
    "one source more": monitor(("gradients", "displacement"), ("stable_rank",)),
    "one source less": monitor(("gradients",), ("stable_rank", "subspace_overlap")),
    "another statistic": monitor(("gradients", "updates"), ("participation_ratio", "subspace_overlap")),
    "fewer layers": monitor(("gradients", "updates"), ("stable_rank", "subspace_overlap"), match="net.0.*"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_probes_may_go_on_from_a_checkpoint(change: str, tmp_path: Path) -> None:
    first = monitor(("gradients", "updates"), ("stable_rank", "subspace_overlap"))
    trained(tmp_path / "first", [first, ModelCheckpoint(tmp_path / "checkpoints")], max_epochs=2)

    trained(tmp_path / "second", [CHANGES[change]], resume=saved(tmp_path / "checkpoints"))

    curves = read(tmp_path / "second")
    assert CHANGES[change].failures == 0
    for quantity in CHANGES[change].watch.quantities:
        steps = [step for step, _ in curves[f"{quantity}/net.0.weight"]]
        assert steps == [9, 12, 15]
        assert not math.isnan(curves[f"{quantity}/net.0.weight"][-1][1])


# A sample that still waits when the run is stopped


class Seldom(Adversaries):
    """Two optimizers; the first steps in one batch of four, the third."""

    def __init__(self) -> None:
        super().__init__(every=3)
        self.critic = nn.Linear(64, 4)  # not a single row, which is no matrix

    def train_dataloader(self) -> Resumable:
        return Resumable()


class StopAfter(L.Callback):
    """Writes a checkpoint when a number of batches is over, and ends the run."""

    def __init__(self, num_batches: int, path: Path) -> None:
        self.num_batches, self.path = num_batches, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.num_batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def seldom() -> Monitor:
    """At a cadence that leaves time for a sample to wait."""
    return monitor(SOURCES[:-1], every_n_steps=4)


def stopped(root: Path, num_batches: int, make: type[L.LightningModule], **options: Any) -> Curves:
    """Curves of a run that is stopped after some batches, and of its continuation."""
    stop = StopAfter(num_batches, root / "stopped.ckpt")
    trained(root / "first", [seldom(), stop], make, **options)
    trained(root / "second", [seldom()], make, resume=stop.path, **options)
    return read(*(folder for folder in (root / "first", root / "second") if [*folder.rglob("metrics.csv")]))


@pytest.mark.parametrize("num_batches", [1, 2, 3, 5, 6])
def test_a_sample_that_waits_for_an_optimizer_goes_on_in_the_resumed_run(num_batches: int, tmp_path: Path) -> None:
    trained(tmp_path / "whole", [seldom()], Seldom)

    found = stopped(tmp_path, num_batches, Seldom)

    expected = read(tmp_path / "whole")
    assert [step for step, _ in expected["gradient_effective_rank/generator.weight"]] == [2, 6, 10, 14]
    assert_same_curves(found, expected)


def test_what_waits_is_known_after_the_run_as_in_its_last_checkpoint(tmp_path: Path) -> None:
    watching, stop = seldom(), StopAfter(2, tmp_path / "stopped.ckpt")

    trained(tmp_path, [watching, stop], Seldom)

    kept = torch.load(stop.path, weights_only=True)["callbacks"][watching.state_key]["waiting"]
    assert watching.state_dict()["waiting"] == kept
    assert list(kept["optimizers"]) == ["0"] and "critic.weight" in kept["given"]["gradient"]


def scaled() -> MixedPrecision:
    """Mixed precision in which the first step overflows, so that it is skipped."""
    return MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-8))


def test_a_sample_of_a_skipped_step_goes_on_in_the_resumed_run(tmp_path: Path) -> None:
    trained(tmp_path / "whole", [seldom()], Ordered, plugins=[scaled()])

    found = stopped(tmp_path, 1, Ordered, plugins=[scaled()])

    expected = read(tmp_path / "whole")
    assert [step for step, _ in expected["gradient_effective_rank/net.0.weight"]] == [1, 4, 8, 12]
    # Rows of the skipped batch were never reported, nor the work on it: features are those of fewer rows, which are
    # logged beside them.
    for curves in (found, expected):
        for tag in [
            tag
            for tag in curves
            if tag.startswith(("feature", "rank/feature", "lowrank/feature", "lowrank/rank_solver"))
        ]:
            del curves[tag]
    assert_same_curves(found, expected)


def test_a_run_stopped_among_accumulated_batches_has_the_point_of_their_step(tmp_path: Path) -> None:
    curves = stopped(tmp_path, 9, Ordered, accumulate_grad_batches=2)

    for tag in ("gradient_effective_rank/net.0.weight", "feature_effective_rank/net.0.out", "lowrank/rank_failures"):
        assert [step for step, _ in curves[tag]] == [0, 4]
    assert curves["lowrank/rank_failures"] == [(0, 0), (4, 0)]


class Interrupted(Seldom):
    """Raises in the second batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise ValueError("the user's own")
        super().training_step(batch, batch_idx)


def test_a_checkpoint_written_on_an_error_knows_what_still_waits(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_on_exception=True)
    with pytest.raises(ValueError, match="own"):
        trained(tmp_path / "first", [seldom(), checkpoint], Interrupted)

    trained(tmp_path / "second", [seldom()], Seldom, resume=saved(tmp_path / "checkpoints"))

    curves = read(tmp_path / "first", tmp_path / "second")
    critic, generator = (
        [step for step, _ in curves[f"gradient_effective_rank/{site}.weight"]] for site in ("critic", "generator")
    )
    assert critic[:2] == [0, 4] and 0 < generator[0] < 4
    assert curves["lowrank/rank_failures"][-1][1] == 0
