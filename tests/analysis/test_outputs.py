"""Where commands write: refused before anything is computed, by name, with what would work."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_lowrank.analysis.cli import COMMANDS, _command, main

# They read the basis first, to compare the output with what it is made of: tests/analysis/subspaces asks them.
OF_A_BASIS = ("subspace extend", "subspace compress", "subspace merge")
TENSORS = ("spectra", "flat-directions", "connect", "merge", "merge-models", "subspace fit")
FOLDERS = ("extract-lora", "subspace reconstruct")
WRITING = [name for name in COMMANDS if "output" in inspect.signature(_command(name)).parameters]
DRAWING = [name for name in COMMANDS if "page" in inspect.signature(_command(name)).parameters]


def words(name: str) -> list[str]:
    """A command whose inputs do not exist: whatever it reads first would be refused."""
    said = name.split()
    for key, one in inspect.signature(_command(name)).parameters.items():
        if one.default is inspect.Parameter.empty and key != "output":
            said += [f"--{key}"] * (one.kind is inspect.Parameter.KEYWORD_ONLY) + ["nowhere"]
    return said


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in ("a.pt", "b.pt"):
        torch.save({f"{i}.weight": torch.randn(8, 6, generator=generator) for i in range(2)}, name)
    return "a.pt", "b.pt"


@pytest.mark.parametrize("output", ["missing/x.safetensors", "folder.safetensors"])
@pytest.mark.parametrize("name", [name for name in WRITING if name not in (*FOLDERS, *OF_A_BASIS)])
def test_no_command_computes_what_it_cannot_write(
    name: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()

    with pytest.raises(SystemExit, match=rf"--output={output} cannot be written: (there is no folder|it is a folder)"):
        main([*words(name), "-o", output])


@pytest.mark.parametrize("page", ["missing/x.html", ".", ""])
@pytest.mark.parametrize("name", DRAWING)
def test_no_command_computes_what_it_cannot_draw(
    name: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [*words(name), *(["-o", "x.safetensors"] if name in WRITING else [])]

    with pytest.raises(SystemExit, match=rf"--page={page} cannot be written: (there is no folder|it is a folder)"):
        main([*given, "--page", page])


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_written_under_their_ending_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    for output in ("x.pt", "x.bin", "x"):
        with pytest.raises(SystemExit, match=rf"--output={output} .* must end in \.safetensors"):
            main([*words(name), "-o", output])


def test_every_command_that_writes_is_asked_here() -> None:
    of_text = {"report", "advise-ranks", "coordinate-check"}

    assert set(WRITING) == {*TENSORS, *FOLDERS, *OF_A_BASIS, *of_text}


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_a_folder_is_not_made_in_the_place_of_a_file(output: str, two: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SystemExit, match=rf"--output={output} cannot be made a folder: file is a file"):
        main(["extract-lora", *two, "-o", output])


def test_a_permutation_is_not_written_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit, match="add --match"):
        main([*words("connect"), "-o", "x.safetensors"])


def test_what_is_written_can_be_read_again(two: tuple[str, str]) -> None:
    main(["merge-models", *two, "--base", two[0], "-o", "merged.safetensors"])
    main(["extract-lora", *two, "-o", "made/adapter"])
    main(["merge", "made/adapter", two[0], "-o", "tuned.safetensors"])
    main(["advise-ranks", *two, "--budget", "100", "-o", "ranks.json"])

    main(["diff", "merged.safetensors", "tuned.safetensors"])
    assert set(load_file("tuned.safetensors")) == set(json.loads(Path("ranks.json").read_text())["ranks"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_said_in_words(two: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match="/dev/full cannot be written: No space left"):
        main(["advise-ranks", *two, "--budget", "100", "-o", "/dev/full"])
