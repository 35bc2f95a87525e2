"""Event files that are damaged: said by name, in every place where their numbers are shown."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_lowrank.analysis.cli import main
from lightning_lowrank.tensorboard.event_files import BLOCK, EventFiles, masked_crc32c
from tests.tab import ask, chromium, damage, open_tab, tensorboard, wait_for_runs, write

STEPS = range(0, 200, 5)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    write(tmp_path / "logs" / "run", *((step, {"a": 1.0 + step, "b": 2.0}) for step in STEPS))
    return tmp_path / "logs"


def last_step(file: Path) -> int:
    """Of what TensorBoard's own reader gets from a file."""
    return max((event.step for event in LegacyEventFileLoader(str(file)).Load()), default=-1)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 100, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 4, 3 * BLOCK + 2])
def test_a_checksum_is_that_of_tensorboard(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)

    assert masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.6, 0.95])
def test_damage_is_said_to_be_where_tensorboard_stops(share: float, logs: Path) -> None:
    file = damage(logs / "run", share)

    (said,) = EventFiles(logs).damage("run")
    last = last_step(file)
    assert last < STEPS[-1] and said.startswith(f"run/{file.name} is damaged ")
    assert ("at its beginning" if last < 0 else f"after step {last}: ") in said


def test_a_file_that_is_replaced_by_a_shorter_one_is_read_anew(logs: Path) -> None:
    files = EventFiles(logs)
    assert files.damage("run") == []
    (file,) = (logs / "run").glob("*tfevents*")
    content = bytearray(file.read_bytes()[: file.stat().st_size // 2])
    content[0] ^= 1
    file.write_bytes(content)

    (said,) = files.damage("run")
    assert "is damaged at its beginning" in said


def test_a_record_that_claims_to_be_longer_than_any_memory_is_one_still_being_written(logs: Path) -> None:
    (file,) = (logs / "run").glob("*tfevents*")
    length = (2**62).to_bytes(8, "little")
    with file.open("ab") as opened:
        opened.write(length + masked_crc32c(length).to_bytes(4, "little") + b"begun")

    assert EventFiles(logs).damage("run") == []


@pytest.mark.parametrize("place", [0, 8, 12, 40, -1])  # in its length, the two checksums, and what it says
def test_any_wrong_byte_of_a_record_is_damage(place: int, logs: Path) -> None:
    (file,) = (logs / "run").glob("*tfevents*")
    content, begin = bytearray(file.read_bytes()), 0
    for _ in range(5):
        begin += 16 + int.from_bytes(content[begin : begin + 8], "little")
    content[begin + place] ^= 1
    file.write_bytes(content)

    (said,) = EventFiles(logs).damage("run")
    assert f"after step {last_step(file)}:" in said


def test_a_record_that_is_no_event_is_damage(logs: Path) -> None:
    (file,) = (logs / "run").glob("*tfevents*")
    with file.open("ab") as end:
        RecordWriter(end).write(b"no event")

    assert f"after step {STEPS[-1]}:" in EventFiles(logs).damage("run")[0]


def test_what_a_writer_has_half_written_is_no_damage_and_is_read_on(logs: Path) -> None:
    (file,) = (logs / "run").glob("*tfevents*")
    content, files = file.read_bytes(), EventFiles(logs)

    for end in range(len(content) // 2, len(content) + 1, 7):
        file.write_bytes(content[:end])
        assert files.damage("run") == []
    file.write_bytes(content + bytes(64))
    assert f"after step {STEPS[-1]}:" in files.damage("run")[0]


@pytest.mark.parametrize("command", ["report", "summary", "diagnose"])
def test_commands_say_once_which_file_is_damaged_and_since_when(
    command: str, logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(logs / "whole", (0, {"a": 1.0}))
    main([command, "logs"])
    assert capsys.readouterr().err == ""
    file = damage(logs / "run")

    main([command, "logs"])

    (line,) = capsys.readouterr().err.splitlines()
    assert f"logs: run/{file.name} is damaged after step {last_step(file)}: " in line


def test_a_folder_of_which_nothing_can_be_read_says_why(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(logs / "run", 0.0)

    with pytest.raises(SystemExit, match="none with vectors"):
        main(["summary", str(logs)])
    assert "is damaged at its beginning" in capsys.readouterr().err


def test_a_report_has_a_note(logs: Path, tmp_path: Path) -> None:
    file = damage(logs / "run")

    main(["report", str(logs), "-o", str(tmp_path / "report.html")])

    found = re.search(r'"damage": (\[.*?\])', (tmp_path / "report.html").read_text())
    assert found and json.loads(found[1])[0].startswith(f"run/{file.name} is damaged after step {last_step(file)}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("loader", ["true", "false"])
def test_the_tab_has_a_note_with_either_of_tensorboards_loaders(loader: str, logs: Path, tmp_path: Path) -> None:
    write(logs / "whole", (0, {"a": 1.0}))
    file = damage(logs / "run")

    with tensorboard(logs, f"--load_fast={loader}") as served, chromium(tmp_path / "profile") as page:
        wait_for_runs(served, 2)
        open_tab(page, served)
        notes = [note.text for note in page.find_elements(By.CSS_SELECTOR, "header .note")]
        known = {run["run"]: run["damage"] for run in ask(served, "runs")["runs"]}
    said = f"run/{file.name} is damaged after step {last_step(file)}: its later numbers are missing or wrong"
    assert known == {"run": [said], "whole": []} and notes == [f"{said}."]
