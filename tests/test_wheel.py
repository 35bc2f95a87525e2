"""What a user installs is the wheel, not this folder."""

import os
import re
import subprocess
import sys
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
from importlib.metadata import distribution
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
import lightning_lowrank
from lightning_lowrank import RankMonitor

monitor = RankMonitor(every_n_steps=2)
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
L.Trainer(accelerator="cpu", max_steps=4, callbacks=[monitor], **options).fit(BoringModel())
assert monitor.latest.values["weight_stable_rank"]
groups = {one.group for one in distribution("lightning-lowrank").entry_points}
assert groups == {"tensorboard_plugins", "console_scripts"}
print(lightning_lowrank.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", target, *wheels.iterdir()], check=True)
    return target


@pytest.mark.slow
def test_a_training_is_watched_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}

    ran = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.splitlines()[-1]).is_relative_to(installed)


@pytest.mark.parametrize("document", ["README.md", "docs/getting-started.md"])
def test_what_a_document_says_to_install_is_all_that_its_first_example_imports(document: str, installed: Path) -> None:
    text = (ROOT / document).read_text()
    line, code = (
        re.search(r"^pip install ([^#\n]*)", text, re.M),
        re.search(r"^```python\n(.*?)^```$", text, re.M | re.S),
    )
    assert line is not None and code is not None
    (wheel,) = distributions(name="lightning-lowrank", path=[str(installed)])

    needed = [requirement for requirement in wheel.requires or [] if "extra ==" not in requirement]
    there = {re.split(r"[^\w-]", words)[0] for words in [*line[1].split(), *needed]}
    imported = {name.split(".")[0] for name in re.findall(r"^(?:import|from) ([\w.]+)", code[1], re.M)}
    providers = packages_distributions()
    assert "lightning-lowrank" in there and "sklearn" in imported
    assert [name for name in imported - {"lightning_lowrank"} if not there & set(providers[name])] == []


def test_the_wheel_has_every_file_of_the_package_and_the_command(installed: Path) -> None:
    def files(folder: Path) -> set[Path]:
        found = {path.relative_to(folder) for path in (folder / "lightning_lowrank").rglob("*") if path.is_file()}
        return {path for path in found if "__pycache__" not in path.parts}

    assert files(installed) == files(ROOT)
    assert (installed / "bin" / "lightning-lowrank").exists()
