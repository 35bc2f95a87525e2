"""Checkpoints on disk: every kind of file, one tensor at a time, and what is refused by name."""

import json
import os
import pickle
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from lightning_lowrank.models.checkpoints import Checkpoint
from tests.trainings import QUIET, Ordered, mlp

STATE = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2), "steps": torch.tensor(3)}


def lightning_file(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    module = Ordered(mlp(8))
    trainer = L.Trainer(**QUIET | {"max_steps": 2, "enable_checkpointing": True})
    trainer.fit(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", module.state_dict()


def sharded_folder(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=64))
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder, model.state_dict()


def saved(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.save({"model_state_dict": STATE, "epoch": 3}, folder / "net.pt")
    return folder / "net.pt", STATE


def in_the_old_format(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.save(STATE, folder / "net.pth", _use_new_zipfile_serialization=False)
    return folder / "net.pth", STATE


def safetensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    save_file(STATE, folder / "net.safetensors")
    return folder, STATE


KINDS: list[Callable[[Path], tuple[Path, dict[str, Tensor]]]] = [
    lightning_file,
    sharded_folder,
    saved,
    in_the_old_format,
    safetensors,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_file_gives_its_tensors(
    kind: Callable[[Path], tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    path, state = kind(tmp_path)

    checkpoint = Checkpoint(path)

    expected = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    assert_close({name: checkpoint.tensor(name) for name in checkpoint.shapes}, expected, rtol=0, atol=0)
    assert checkpoint.shapes == {name: tensor.shape for name, tensor in expected.items()}


@pytest.mark.parametrize("kind", [safetensors, sharded_folder], ids=lambda kind: kind.__name__)
def test_a_tensor_that_was_read_is_not_kept(
    kind: Callable[[Path], tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(kind(tmp_path)[0])
    tensor = checkpoint.tensor(next(iter(checkpoint.shapes)))
    alive = weakref.ref(tensor)

    del tensor

    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float32, torch.float64])
def test_safetensors_are_read_at_any_place_of_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    drawn = {"bytes": (3,), "scalar": (), "none": (0, 4), "wide": (5, 3)}
    state = {
        name: torch.randn(shape).to(torch.float8_e5m2 if name == "bytes" else dtype) for name, shape in drawn.items()
    }
    file = tmp_path / "net.safetensors"
    header, content = {}, b""
    for name, tensor in state.items():  # in this order, so that all but the first lie at odd places
        kind = "F8_E5M2" if name == "bytes" else {1: "F8_E4M3", 4: "F32", 8: "F64"}.get(dtype.itemsize, "F16")
        kind = "BF16" if tensor.dtype == torch.bfloat16 else kind
        new = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        begin, content = len(content), content + new
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, len(content)]}
    words = json.dumps(header).encode()
    file.write_bytes(len(words).to_bytes(8, "little") + words + content)

    found = Checkpoint(file)

    assert {name: found.tensor(name).dtype for name in state} == {name: one.dtype for name, one in state.items()}
    for name, tensor in state.items():
        assert_close(found.tensor(name).float(), tensor.float(), rtol=0, atol=0)
    found.tensor("wide").zero_()  # a copy of what was read, not of the file
    assert float(found.tensor("wide").float().abs().sum()) > 0


def test_the_skeleton_has_the_names_shapes_and_ties_and_no_values(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    torch.save(model.state_dict(), tmp_path / "tied.pt")

    skeleton = Checkpoint(tmp_path / "tied.pt").skeleton()

    assert {name: p.shape for name, p in skeleton.named_parameters(remove_duplicate=False)} == {
        "embed.weight": (7, 4),
        "head.weight": (7, 4),
    }
    assert len(list(skeleton.parameters())) == 1
    assert all(p.is_meta for p in skeleton.parameters())


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_refused_and_never_runs(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "hook": Code(str(tmp_path / "ran"))}, tmp_path / "evil.ckpt")

    with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read .*such as posix.mkdir, .*state_dict\(\)"):
        Checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def half_of_the_shards(folder: Path) -> Path:
    sharded_folder(folder)
    sorted(folder.glob("model-0*.safetensors"))[0].unlink()
    return folder


def a_short_shard(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def cut_short(folder: Path) -> Path:
    save_file(STATE, folder / "net.safetensors")
    (folder / "net.safetensors").write_bytes((folder / "net.safetensors").read_bytes()[:-7])
    return folder / "net.safetensors"


def no_zip(folder: Path) -> Path:
    (folder / "net.pt").write_bytes(b"PK" + bytes(100))
    return folder / "net.pt"


def a_text(folder: Path) -> Path:
    (folder / "net.pt").write_text("hello")
    return folder / "net.pt"


def empty(folder: Path) -> Path:
    (folder / "net.pt").write_bytes(b"")
    return folder / "net.pt"


def a_short_text(folder: Path) -> Path:
    (folder / "net.pt").write_text("hello world, this is text")  # torch says: 101
    return folder / "net.pt"


def cut_in_the_middle(folder: Path) -> Path:
    torch.save(STATE, folder / "net.pt")
    (folder / "net.pt").write_bytes((folder / "net.pt").read_bytes()[:-40])
    return folder / "net.pt"


def cut_and_old(folder: Path) -> Path:
    torch.save(STATE, folder / "net.pt", _use_new_zipfile_serialization=False)
    (folder / "net.pt").write_bytes((folder / "net.pt").read_bytes()[:-40])
    return folder / "net.pt"


def damaged(folder: Path) -> Path:
    torch.save(STATE, folder / "net.pt")
    content = bytearray((folder / "net.pt").read_bytes())
    place = content.index(b"data.pkl") + 60
    content[place : place + 8] = b"\xff" * 8
    (folder / "net.pt").write_bytes(content)
    return folder / "net.pt"


def a_module(folder: Path) -> Path:
    torch.save(torch.nn.Linear(2, 2), folder / "net.pt")
    return folder / "net.pt"


def a_pickle(folder: Path) -> Path:
    (folder / "net.pt").write_bytes(pickle.dumps({"path": folder}))
    return folder / "net.pt"


def a_program(folder: Path) -> Path:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "net.pt")
    return folder / "net.pt"


def a_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "net.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    return folder / "net.pt"


def a_pointer(folder: Path) -> Path:
    (folder / "net.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    return folder / "net.safetensors"


def one_of_safetensors(folder: Path) -> Path:
    save_file(STATE, folder / "net.safetensors")
    return (folder / "net.safetensors").rename(folder / "net.pt")


def one_of_torch(folder: Path) -> Path:
    torch.save(STATE, folder / "net.safetensors")
    return folder / "net.safetensors"


def a_text_of_safetensors(folder: Path) -> Path:
    return a_text(folder).rename(folder / "net.safetensors")


def a_list_for_an_index(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    return folder


def a_number_for_a_shard(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    return folder


def no_weights(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    return folder


def an_object(folder: Path) -> Path:
    torch.save([1, 2], folder / "net.pt")
    return folder / "net.pt"


def no_tensors(folder: Path) -> Path:
    torch.save({"epoch": 3, "loops": {}}, folder / "net.pt")
    return folder / "net.pt"


def integers(folder: Path) -> Path:
    save_file({"ids": torch.arange(3)}, folder / "net.safetensors")
    return folder


def names_that_are_numbers(folder: Path) -> Path:
    torch.save({0: torch.ones(2, 2)}, folder / "net.pt")
    return folder / "net.pt"


def without_values(folder: Path) -> Path:
    torch.save({"a": torch.ones(2, 2, device="meta")}, folder / "net.pt")
    return folder / "net.pt"


def a_sparse_one(folder: Path) -> Path:
    torch.save({"a": torch.eye(2).to_sparse(), "b": torch.eye(2)}, folder / "net.pt")
    return folder / "net.pt"


def several(folder: Path) -> Path:
    for name in ("a.pt", "b.pt"):
        torch.save(STATE, folder / name)
    return folder


def another_kind(folder: Path) -> Path:
    (folder / "net.gguf").write_bytes(b"GGUF")
    return folder / "net.gguf"


def of_many_processes(folder: Path) -> Path:
    (folder / ".metadata").write_bytes(b"")
    return folder


REFUSED: dict[Callable[[Path], Path], str] = {
    half_of_the_shards: r"shards; \['model-00001-of-.*'\] are missing",
    a_short_shard: r"one\.safetensors lacks \['b'\]",
    cut_short: r"net\.safetensors cannot be read as safetensors: it is cut off or damaged",
    no_zip: r"net\.pt cannot be read as a checkpoint: it is no checkpoint",
    a_text: r"net\.pt cannot be read as a checkpoint: it is no checkpoint",
    a_short_text: r"net\.pt cannot be read as a checkpoint: it is no checkpoint",
    empty: r"net\.pt cannot be read as a checkpoint: it is empty",
    cut_in_the_middle: r"net\.pt cannot be read as a checkpoint: it is cut off; copy",
    cut_and_old: r"net\.pt cannot be read as a checkpoint: it is cut off or damaged",
    damaged: r"net\.pt cannot be read as a checkpoint: it is damaged",
    a_module: r"such as torch\.nn\.modules\.linear\.Linear, and loading that would run code",
    a_pickle: r"it was written by pickle, which can run code",
    a_program: r"it is a program of TorchScript\. Save only the weights",
    a_zip: r"net\.pt cannot be read as a checkpoint: it is no checkpoint",
    a_pointer: "it is a pointer of Git LFS, not the file itself",
    one_of_safetensors: r"it is a file of safetensors; rename it to end in \.safetensors",
    one_of_torch: r"it is a file of torch\.save; rename it to end in \.pt",
    a_text_of_safetensors: "it is not a file of safetensors",
    a_list_for_an_index: "is not an index of shards",
    a_number_for_a_shard: "is not an index of shards",
    no_weights: r"contains none of .*; it has no \['\.safetensors', .*\] file at all",
    an_object: "contains a list; expected a dictionary of tensors",
    no_tensors: r"no floating-point tensors at the top .* its keys are \['epoch', 'loops'\]",
    integers: "no floating-point tensors",
    names_that_are_numbers: r"no floating-point tensors at the top .* its keys are \[0\]",
    without_values: r"net\.pt has tensors without values .*, \['a'\]; save them from the CPU",
    a_sparse_one: r"net\.pt has tensors .* without all entries \(sparse\), \['a'\]",
    several: r"give one of its files, \['a\.pt', 'b\.pt'\]",
    another_kind: r"only \['\.safetensors'",
    of_many_processes: "consolidate_checkpoint",
    lambda folder: folder / "nothing": "there is no file or folder .*nothing",
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_cannot_be_read_is_refused_by_name(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED[make]):
        Checkpoint(make(tmp_path))


def test_a_name_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)

    with pytest.raises(ValueError, match=r"no tensor 'fc'; it has \['fc\.weight', 'fc\.bias'\]"):
        Checkpoint(path).tensor("fc")
