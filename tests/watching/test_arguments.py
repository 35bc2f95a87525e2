"""Every public argument of every monitor with values of wrong types and out of range: refused when the monitor is made
or before training, in words of a `ValueError`, or meant well.

Without the run-time type checks of the tests, as users have it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import inspect, json, sys, warnings
import lightning as L, torch
import lightning_lowrank as ll
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
ODD = [0, -1, 10**6, 1.5, True, "nonsense", [], [1], {"a": 1}, object(), float("nan"), b"x", (), lambda: None]


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 6), torch.randint(3, (8,))), 4)


quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
bad, tried = [], 0
kind = getattr(ll, sys.argv[1])
NEEDED = {"RankAdvisor": {"budget": 1000}}.get(sys.argv[1], {})
for name in inspect.signature(kind.__init__).parameters:
    if name == "self":
        continue
    for i, value in enumerate(ODD):
        tried += 1
        try:
            monitor = kind(**{**NEEDED, name: value})
        except ValueError as error:
            if name.split("_")[0].rstrip("s") not in str(error):
                bad.append(f"{name}={value!r}: says only {error}")
            continue
        except BaseException as error:
            bad.append(f"{name}={value!r}: {type(error).__name__}: {error}"[:200])
            continue
        try:
            L.Trainer(max_steps=1, callbacks=[monitor], **quiet).fit(Model())
        except ValueError as error:
            if len(str(error)) < 20:
                bad.append(f"{name}={value!r}: says only {error}")
        except BaseException as error:
            bad.append(f"{name}={value!r}: {type(error).__name__}: {error}"[:200])
print(json.dumps({"bad": bad, "tried": tried}))
"""

KINDS = [
    *("RankMonitor", "CurvatureMonitor", "NTKMonitor", "MultifractalMonitor"),
    *("GradientAnatomyMonitor", "ConcentrationMonitor", "DormantUnitsMonitor"),
    *("NoiseScaleMonitor", "RepresentationMonitor", "AttentionMonitor"),
    *("NoiseScaleMonitor", "RepresentationMonitor", "ActivationMonitor", "RouterMonitor"),
    *("NoiseScaleMonitor", "RepresentationMonitor", "LossMonitor"),
    *("CoordinateCheckMonitor", "RankAdvisor"),
    *("NoiseScaleMonitor", "RepresentationMonitor", "TrajectorySubspace"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_arguments_are_refused_in_words_or_meant_well(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind], capture_output=True, text=True, cwd=Path.cwd(), check=False
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"bad": [done.stderr[-2000:]]}

    assert found["bad"] == []
    assert found["tried"] > 80
