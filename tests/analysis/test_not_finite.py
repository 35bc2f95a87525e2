"""Weights that are NaN, infinite or unreadable: each command that would compute with them names the file, says what is
wrong, and writes nothing.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_lowrank.analysis.cli import main
from tests.trainings import digits, mlp

DATA = f"{__name__}:task"


def task() -> Any:
    """A network with its data."""
    return mlp(16), {"test": [digits(64).tensors]}, lambda net, batch: {"loss": cross_entropy(net(batch[0]), batch[1])}


COMMANDS = {
    "merge-models": "merge-models 1.pt BAD --base 0.pt -o out.safetensors",
    "merge-models, base": "merge-models 1.pt 2.pt --base BAD -o out.safetensors",
    "merge": "merge lora BAD -o out.safetensors",
    "merge, adapter": "merge broken 0.pt -o out.safetensors",
    "extract-lora": "extract-lora 0.pt BAD -o out",
    "advise-ranks": "advise-ranks 0.pt BAD --budget 1000 -o out",
    "masks": "masks 0.pt BAD --density 0.2",
    "connect": f"connect 0.pt BAD {DATA}",
    "importance": f"importance BAD {DATA}",
    "flat-directions": f"flat-directions BAD {DATA}",
    "subspace fit": "subspace fit 1.pt 2.pt BAD --base 0.pt -o out.safetensors",
    "subspace project": "subspace project basis.safetensors BAD",
    "subspace compress": "subspace compress basis.safetensors BAD -o out.safetensors",
    "subspace extend": "subspace extend basis.safetensors BAD -o out.safetensors",
    "subspace merge": "subspace merge basis.safetensors --base BAD -o out.safetensors",
    "subspace reconstruct": "subspace reconstruct basis.safetensors --base BAD -o out",
}
READING = {name: words for name, words in COMMANDS.items() if "BAD" in words} | {
    "spectra": "spectra BAD",
    "diff": "diff 0.pt BAD",
    "a basis": "subspace project BAD 0.pt",
    "coefficients": "subspace reconstruct basis.safetensors --coefficients BAD -o out",
}
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "text.pt": (b"hello world, this is text", "it is no checkpoint|it is not a file of safetensors"),
    "empty.pt": (b"", "it is empty"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
    "text.safetensors": (b"hello world, this is text", "it is not a file of safetensors"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks, a basis and an adapter of them, and what is broken."""
    folder = tmp_path_factory.mktemp("nets")
    torch.manual_seed(0)
    states = [mlp(16).state_dict() for _ in range(4)]
    for i, state in enumerate(states):
        torch.save(state, folder / f"{i}.pt")
    for name, value in (("nan", torch.nan), ("inf", torch.inf)):
        broken = states[3]["2.weight"].clone()
        broken[0, 0] = value
        torch.save(states[3] | {"2.weight": broken}, folder / f"{name}.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["subspace", "fit", "1.pt", "2.pt", "3.pt", "--base", "0.pt", "-o", "basis.safetensors"])
        for name in ("lora", "broken"):
            main(["extract-lora", "0.pt", "1.pt", "-o", name])
    file = folder / "broken" / "adapter_model.safetensors"
    save_file({key: tensor / 0 if "2.lora_A" in key else tensor for key, tensor in load_file(file).items()}, file)
    return folder


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_and_a_tensor_are_named_and_nothing_is_written(
    command: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    there = "broken" if "broken" in COMMANDS[command] else f"{value}.pt"

    with pytest.raises(SystemExit) as refused:
        main(COMMANDS[command].replace("BAD", there).split())

    assert re.search(rf"(?s)(?=.*{re.escape(there)})(?=.*2\.(weight|lora_A)).*not finite", str(refused.value))
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize("file", UNREADABLE)
@pytest.mark.parametrize("command", READING)
def test_an_unreadable_file_is_named_with_what_is_wrong(
    command: str, file: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / file).write_bytes(UNREADABLE[file][0])

    with pytest.raises(SystemExit) as refused:
        main(READING[command].replace("BAD", file).split())

    assert re.search(rf"{re.escape(file)} cannot be read as .*: ({UNREADABLE[file][1]})", str(refused.value))
    assert not list(folder.glob("out*"))


def test_an_unreadable_adapter_is_named_with_what_is_wrong(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    copied = Path(shutil.copytree("lora", tmp_path / "copied"))
    (copied / "adapter_model.safetensors").write_bytes(b"")

    with pytest.raises(SystemExit, match=r"adapter_model.safetensors cannot be read as safetensors: it is empty"):
        main(["merge", str(copied), "0.pt", "-o", "out.safetensors"])


def test_a_mask_of_minus_infinity_is_no_weight_and_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    mask = torch.full((4, 4), -torch.inf).triu(1)
    for name in "012":
        torch.save({"mask": mask, **torch.load(f"{name}.pt", weights_only=True)}, f"masked{name}.pt")

    main(["merge-models", "masked1.pt", "masked2.pt", "--base", "masked0.pt", "-o", "merged.safetensors"])

    merged = load_file("merged.safetensors")
    assert torch.equal(merged["mask"], mask)
    both = [torch.load(f"{name}.pt", weights_only=True)["0.weight"] for name in "12"]
    assert_close(merged["0.weight"], (both[0] + both[1]) / 2)
