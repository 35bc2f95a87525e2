"""Launchers that spawn or fork processes send `callback_metrics` home through a pipe of 64 KiB that nobody reads until
the process has ended: with too much in it the training is over and never returns.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import warnings
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_lowrank import RankMonitor, MultifractalMonitor, GradientAnatomyMonitor, ConcentrationMonitor

ALL = ["gradients", "weights", "updates", "displacement", "optimizer_state", "features"]
warnings.simplefilter("ignore")

if __name__ == "__main__":
    kinds = (MultifractalMonitor, GradientAnatomyMonitor, ConcentrationMonitor)
    monitors = [RankMonitor(ALL, every_n_steps=1, name=name) for name in ("one", "two")]
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="{strategy}", max_steps=2, limit_val_batches=0,
                        callbacks=[*monitors, *(kind(every_n_steps=1) for kind in kinds)], **quiet)
    trainer.fit(BoringModel())
    print("returned")
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_fit_returns_whatever_monitors_have_put_into_the_metrics(strategy: str, tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(SCRIPT.replace("{strategy}", strategy))

    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=240, check=False)

    assert "returned" in done.stdout, done.stderr[-2000:]
