"""Commands that take a network and its data: lines, masks and importance of real checkpoints, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_lowrank.analysis.cli import main
from tests.trainings import digits, mlp

DATA = f"{__name__}:task"


def measure(module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    outputs = module(batch[0])
    return {"loss": cross_entropy(outputs, batch[1]), "accuracy": (outputs.argmax(1) == batch[1]).float().mean()}


def task() -> tuple[nn.Module, Mapping[str, Any], Any]:
    """What `--data` names."""
    images, labels = digits(256).tensors
    return mlp(16), {"train": [(images[:128], labels[:128])], "test": [(images[128:], labels[128:])]}, measure


def language() -> Any:
    """A model of Hugging Face whose head is its embedding, which safetensors has once."""
    sizes = {"vocab_size": 20, "n_embd": 12, "n_layer": 1, "n_head": 3, "n_positions": 16}
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(20, (8, 9), generator=torch.Generator().manual_seed(0))

    def of_tokens(module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        return {"loss": module(batch[0], labels=batch[0]).loss}

    return module, {"test": [(tokens,)]}, of_tokens


def another() -> Any:
    return mlp(16)


def without_batches() -> Any:
    module, _, its = task()
    return module, {"test": []}, its


def a_number() -> Any:
    module, data, _ = task()
    return module, data, lambda module, batch: module(batch[0]).sum()


def files_that_are_not_there() -> Any:
    return torch.load("nowhere.pt")


def of_a_size(size: int) -> Any:
    return task()


def no_loss() -> Any:
    module, data, _ = task()
    return module, data, lambda module, batch: {"error": module(batch[0]).sum()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two networks trained from different starts."""
    folder = tmp_path_factory.mktemp("nets")
    images, labels = digits(256).tensors
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = mlp(16)
        optimizer = torch.optim.Adam(module.parameters(), 3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            cross_entropy(module(images[:128]), labels[:128]).backward()
            optimizer.step()
        torch.save(module.state_dict(), folder / f"{seed}.pt")
    return str(folder / "1.pt"), str(folder / "2.pt")


def test_matching_lowers_the_barrier_and_keeps_the_function(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["connect", *two, DATA, "--match", "--points", "5", "-o", str(tmp_path / "b.safetensors"), "--json"])

    told = json.loads(capsys.readouterr().out)
    before, after = told["as they are"]["barriers"], told["matched"]["barriers"]
    assert told["places"] == [0, 0.25, 0.5, 0.75, 1]
    assert before["train/loss"] > 0 and after["train/loss"] < 0.7 * before["train/loss"]
    assert len(told["used"]) == 2 and told["deviation"] < 1e-5
    images = digits(64).tensors[0]
    one, other = mlp(16), mlp(16)
    one.load_state_dict(torch.load(two[1], weights_only=True))
    other.load_state_dict(load_file(tmp_path / "b.safetensors"))
    assert not torch.equal(one[0].weight, other[0].weight)
    assert_close(one(images), other(images), rtol=1e-4, atol=1e-5)


def test_a_specification_says_which_units_may_change_places(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"first": [["0.weight", 0], ["0.bias", 0], ["2.weight", 1]]}
    (tmp_path / "groups.json").write_text(json.dumps(groups))

    words = ["--match", "--points", "3", "--specification", str(tmp_path / "groups.json")]
    main(["connect", *two, DATA, *words, "--page", str(tmp_path / "line.html")])

    page = (tmp_path / "line.html").read_text()
    assert "line_accuracy" in page and '"steps": [0, 50, 100]' in page
    told = capsys.readouterr().out
    assert "1 group(s) of units permuted" in told and "barrier" in told


def test_models_of_hugging_face_are_matched_without_a_specification(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(language()[0])
        models[-1].save_pretrained(tmp_path / str(seed))
    folders = [str(tmp_path / str(seed)) for seed in (1, 2)]

    words = ["--match", "--points", "3", "-o", str(tmp_path / "b.safetensors"), "--json"]
    main(["connect", *folders, f"{__name__}:language", *words])

    told = json.loads(capsys.readouterr().out)
    assert "stream" in told["used"] and told["dropped"] == [] and told["deviation"] < 1e-5
    other = language()[0]
    other.load_state_dict(load_file(tmp_path / "b.safetensors"))
    tokens = language()[1]["test"][0][0]
    assert not torch.equal(other.transformer.wte.weight, models[1].transformer.wte.weight)
    assert_close(other.eval()(tokens).logits, models[1].eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_masks_of_one_checkpoint_are_the_same_and_of_two_by_chance(
    two: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["masks", two[0], two[0], "--density", "0.2", "--json"])
    same = json.loads(capsys.readouterr().out)
    main(["masks", *two, "--density", "0.2", "--scope", "layer", "--json"])
    other = json.loads(capsys.readouterr().out)

    assert all(row["jaccard"] == 1 and row["hamming"] == 0 for row in same.values())
    sizes = {name: p.numel() for name, p in mlp(16).named_parameters() if p.ndim > 1}
    kept = sum(sizes[name] * row["densities"][0] for name, row in same.items())
    assert kept == pytest.approx(0.2 * sum(sizes.values()), abs=1)
    assert other["0.weight"]["densities"] == pytest.approx([0.2, 0.2], abs=1e-2)
    assert other["0.weight"]["chance"] == pytest.approx(0.2 / 1.8, rel=0.02)
    assert abs(other["2.weight"]["jaccard"] - other["2.weight"]["chance"]) < 0.1


def test_importance_is_the_gradient_by_a_gate(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["importance", two[0], DATA, "--json"])

    told = json.loads(capsys.readouterr().out)
    module = mlp(16)
    module.load_state_dict(torch.load(two[0], weights_only=True))
    (batch,) = task()[1]["train"]
    gates = torch.ones(16, requires_grad=True)
    loss = cross_entropy(module[2:](module[1](module[0](batch[0])) * gates), batch[1])
    (expected,) = torch.autograd.grad(loss, gates)
    assert_close(torch.tensor(told["neurons of 2"]), expected.abs(), rtol=1e-4, atol=1e-6)
    main(["importance", two[0], DATA, "--page", str(tmp_path / "units.html")])
    assert f"{int(expected.abs().argmax())} (" in capsys.readouterr().out
    assert "neuron_importance_largest" in (tmp_path / "units.html").read_text()


def overflowing() -> Any:
    """A measure that some network breaks."""
    module, data, _ = task()
    return module, data, lambda module, batch: {"loss": module(batch[0]).sum() * torch.inf}


@pytest.mark.parametrize("command", ["connect A B", "importance A"])
def test_a_number_that_does_not_exist_is_null(
    command: str, two: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"A": two[0], "B": two[1]}.get(word, word) for word in command.split()]

    main([*given, f"{__name__}:overflowing", "--json"])

    told = capsys.readouterr().out
    assert "null" in told and "NaN" not in told and json.loads(told)


REFUSED = {
    ("connect", "A", "B", "nothing"): "expected module:function",
    ("connect", "A", "B", f"{__name__}:another"): r"returned a Sequential; expected \(module, data, measure\)",
    ("connect", "A", "B", DATA, "--points", "2"): "points=2",
    ("connect", "A", "B", DATA, "--calibrate", "valid"): r"--calibrate=valid: .* has \['train', 'test'\]",
    ("connect", "A", "B", DATA, "--match", "--specification", "nowhere.json"): "is not a JSON file of groups",
    ("connect", "A", "C", DATA): r"c\.pt does not fit this network: it lacks \['2\.weight'",
    ("masks", "A", "C"): "no tensor has the same name and shape in both",
    ("masks", "A", "B", "--density", "0"): "density=0.0 must be above 0",
    ("masks", "A", "B"): "no weight is zero in either file; .* --density",
    ("masks", "A", "D", "--density", "0.2"): r"d\.pt has weights that are not finite, in \['0\.weight'\]",
    ("connect", "A", "B", f"{__name__}:without_batches"): "the data set 'test' has no examples",
    ("connect", "A", "B", f"{__name__}:a_number"): "the measure returned a Tensor",
    ("connect", "A", "B", f"{__name__}:files_that_are_not_there"): "files_that_are_not_there raised FileNotFoundError",
    ("connect", "A", "B", f"{__name__}:of_a_size"): "of_a_size cannot be called without arguments",
    ("importance", "A", f"{__name__}:a_number"): "the measure returned a Tensor",
    ("importance", "A", f"{__name__}:no_loss"): r"the measure returned \['error'\]",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_cannot_be_done_is_refused_in_words(words: tuple[str, ...], two: tuple[str, str], tmp_path: Path) -> None:
    torch.save({"0.weight": torch.ones(16, 3), "0.bias": torch.ones(16)}, tmp_path / "c.pt")
    broken = torch.load(two[0], weights_only=True) | {"0.weight": torch.full((16, 64), torch.nan)}
    torch.save(broken, tmp_path / "d.pt")
    files = {"A": two[0], "B": two[1], "C": str(tmp_path / "c.pt"), "D": str(tmp_path / "d.pt")}
    given = [files.get(word, word) for word in words]

    with pytest.raises(SystemExit, match=REFUSED[words]):
        main(given)
