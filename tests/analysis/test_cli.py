"""However a Trainer is made and run: from a command line, by the other package, dry, without training, or one after
another.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_lowrank import Monitor, RankMonitor
from tests.trainings import MemoryLogger, Validated

MEDIAN = "rank/gradient_stable_rank_median"
# Lightning's own use of jsonargparse.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Whole(Validated):
    """All loops, and no argument that a command line could not give."""

    def __init__(self) -> None:
        super().__init__()

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self.log("test_loss", self(batch[0]).mean())

    def predict_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch[0])

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()


CONFIG = """
trainer:
  max_epochs: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: SAVE_DIR, name: "", version: ""}}
  callbacks:
    - class_path: lightning_lowrank.RankMonitor
      init_args:
        sources: [gradients, optimizer_state]
        statistics: [stable_rank, energy_rank_0.01]
        every_n_steps: 3
        per_site: false
        match: ["*.0.weight"]
"""


def command_line(monkeypatch: pytest.MonkeyPatch, *words: str) -> L.Trainer:
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    return LightningCLI(Whole, save_config_callback=None, seed_everything_default=0).trainer


def monitor_of(trainer: L.Trainer) -> Monitor:
    (monitor,) = (callback for callback in trainer.callbacks if isinstance(callback, Monitor))  # type: ignore[attr-defined]
    return monitor


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("SAVE_DIR", str(tmp_path / "logs")))
    return str(path)


def test_a_configuration_file_makes_a_monitor(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = monitor_of(command_line(monkeypatch, "fit", "--config", config))

    assert monitor.recorders[0].quantities == ["gradient_stable_rank", "gradient_energy_rank_0.01"]
    assert monitor.latest is not None and monitor.latest.step == 6
    assert monitor.latest.values["gradient_stable_rank"].keys() == {"net.0.weight"}
    header = (tmp_path / "logs" / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert MEDIAN in header and not any(tag.startswith("gradient_") for tag in header)


def test_the_command_line_overrides_the_file(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = monitor_of(command_line(monkeypatch, "fit", "--config", config, "--trainer.callbacks.every_n_steps=5"))

    assert monitor.latest is not None and monitor.latest.step == 5


def test_the_command_line_alone_makes_a_monitor(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "--trainer.callbacks+=lightning_lowrank.RankMonitor",
        "--trainer.callbacks.every_n_steps=4",
        "--trainer.callbacks.name=more",
    ]

    trainer = command_line(monkeypatch, "fit", "--config", config, *words)

    found = {callback.label: callback.latest for callback in trainer.callbacks if isinstance(callback, Monitor)}  # type: ignore[attr-defined]
    assert {label: latest.step for label, latest in found.items() if latest} == {"rank": 6, "more_rank": 4}


@pytest.mark.parametrize("wrong", ["every_n_steps=0", "per_site=maybe", "sources=[gradient]", "every_n_step=5"])
def test_the_command_line_refuses_what_cannot_work(
    wrong: str, config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as refusal:
        command_line(monkeypatch, "fit", "--config", config, f"--trainer.callbacks.{wrong}")

    assert wrong.partition("=")[2].strip("[]") in capsys.readouterr().err + str(refusal.value)


IN_THE_OTHER_PACKAGE = """
import sys
import pytorch_lightning as pl, torch
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader
from lightning_lowrank import RankMonitor
from tests.trainings import digits

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(64, 10)
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def train_dataloader(self):
        return DataLoader(digits(), batch_size=8)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

monitor, root = RankMonitor(every_n_steps=3), sys.argv[1]
logger = CSVLogger(root, name="", version="")
trainer = pl.Trainer(
    max_epochs=1, default_root_dir=root, logger=logger, callbacks=[monitor], enable_progress_bar=False
)
trainer.fit(Module())
print(monitor.latest.step, monitor.failures)
sys.argv = ["train.py", "fit", "--trainer.callbacks+=lightning_lowrank.RankMonitor"]
LightningCLI(Module)
"""


@pytest.mark.slow
def test_the_trainer_of_the_other_package_works_and_its_command_line_refuses_us(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_OTHER_PACKAGE, str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert done.stdout.splitlines()[-1] == "6 0"
    assert MEDIAN in (tmp_path / "metrics.csv").read_text()
    assert done.returncode == 2 and "Import path does not correspond to a subclass of Callback" in done.stderr


@pytest.mark.filterwarnings("ignore:.*barebones")
def test_a_barebones_trainer_is_left_alone() -> None:
    monitor = RankMonitor(every_n_steps=1, detail="all")

    L.Trainer(barebones=True, max_steps=3, callbacks=[monitor]).fit(Whole())

    assert monitor.latest is None and monitor.failures == 0


def test_a_dry_run_samples_and_writes_nothing(tmp_path: Path) -> None:
    monitor = RankMonitor(["gradients", "validation_features"], histograms=True, detail="all")

    L.Trainer(default_root_dir=tmp_path, logger=CSVLogger(tmp_path), fast_dev_run=2, callbacks=[monitor], **QUIET).fit(
        Whole()
    )

    assert monitor.latest is not None and monitor.failures == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
@pytest.mark.parametrize("trained", [False, True], ids=["at once", "after training"])
def test_without_training_nothing_is_written(loop: str, trained: bool) -> None:
    monitor, before, after = (
        RankMonitor(["gradients", "validation_features"], every_n_steps=1, detail="all"),
        MemoryLogger(),
        MemoryLogger(),
    )
    module = Whole()
    if trained:
        L.Trainer(max_epochs=1, logger=before, callbacks=[monitor], **QUIET).fit(module)
    latest, overhead = monitor.latest, monitor.overhead

    getattr(L.Trainer(logger=after, callbacks=[monitor], **QUIET), loop)(module)

    assert not any("rank" in tag for tag in after.curves())
    assert monitor.latest is latest and monitor.overhead == overhead
    assert not any(layer._forward_hooks for layer in module.modules())


def test_one_monitor_can_watch_one_run_after_another() -> None:
    monitor, loggers = RankMonitor(every_n_steps=3, detail="all"), [MemoryLogger(), MemoryLogger()]

    for logger in loggers:
        L.Trainer(max_epochs=1, logger=logger, callbacks=[monitor], **QUIET).fit(Whole())

    first, second = (list(logger.curve(MEDIAN)) for logger in loggers)
    assert first == second == [0, 3, 6]


def test_one_monitor_can_watch_many_runs_of_one_step() -> None:
    monitor, loggers = RankMonitor(detail="all"), [MemoryLogger(), MemoryLogger()]

    for logger in loggers:
        L.Trainer(max_steps=1, logger=logger, callbacks=[monitor], **QUIET).fit(Whole())

    assert [list(logger.curve(MEDIAN)) for logger in loggers] == [[0], [0]]


def test_one_trainer_can_fit_on() -> None:
    logger = MemoryLogger()
    trainer = L.Trainer(max_epochs=1, logger=logger, callbacks=[RankMonitor(every_n_steps=3, detail="all")], **QUIET)
    module = Whole()

    trainer.fit(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)

    assert list(logger.curve(MEDIAN)) == [0, 3, 6, 9, 12, 15]


def test_another_module_has_other_sites() -> None:
    monitor = RankMonitor(["gradients"], every_n_steps=1, detail="all")
    wide = Whole()
    wide.net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 10))

    for module in (Whole(), wide):
        L.Trainer(max_steps=2, logger=False, callbacks=[monitor], **QUIET).fit(module)

    assert monitor.latest is not None and monitor.failures == 0
    assert monitor.latest.values["gradient_stable_rank"].keys() == {"net.0.weight", "net.1.weight", "net.2.weight"}


def test_two_trainers_in_turn_keep_their_monitors_apart() -> None:
    class Inner(L.Callback):
        """A run within a run."""

        def on_train_epoch_end(self, *_: Any) -> None:
            L.Trainer(max_epochs=1, logger=inner_logger, callbacks=[inner], **QUIET).fit(Whole())

    outer, inner = RankMonitor(every_n_steps=2, detail="all"), RankMonitor(every_n_steps=3, detail="all")
    outer_logger, inner_logger = MemoryLogger(), MemoryLogger()

    L.Trainer(max_epochs=1, logger=outer_logger, callbacks=[outer, Inner()], **QUIET).fit(Whole())

    assert (list(outer_logger.curve(MEDIAN)), list(inner_logger.curve(MEDIAN))) == ([0, 2, 4, 6], [0, 3, 6])


PROBES = """
trainer:
  max_steps: 3
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  logger: false
  callbacks:
    - class_path: lightning_lowrank.Monitor
      init_args:
        probes:
          - name: gradient
            source:
              class_path: lightning_lowrank.Gradients
              init_args: {views: {net.0.weight: {pattern: "(heads d) n -> heads d n", sizes: {heads: 4}}}}
            statistics: [stable_rank]
            schedule: {n: 2}
"""


def test_probes_and_views_of_ones_own_come_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(PROBES)

    monitor = monitor_of(command_line(monkeypatch, "fit", "--config", str(config)))

    assert monitor.latest is not None
    assert monitor.latest.step == 2
    assert "net.0.weight.h3" in monitor.latest.values["gradient_stable_rank"]
