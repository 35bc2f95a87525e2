"""Ranks, adapters and merges of checkpoints from the command line; peft itself loads what is written."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lightning_lowrank.analysis.cli import main
from tests.trainings import gpt2, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
X = torch.rand(5, 64)
RANKS = {"0.weight": 1, "2.weight": 3, "4.weight": 2}


class Convolving(nn.Sequential):
    """A convolution, an embedding's worth of inputs aside."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, 1, 8, 8))


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed((19 * x[:, :7]).long()).mean(1))


def moved_by(module: nn.Module, ranks: dict[str, int] | int, within: str = "") -> nn.Module:
    """A copy whose weights moved by matrices of these ranks."""
    torch.manual_seed(1)
    after = copy.deepcopy(module)
    for name, p in after.named_parameters():
        rank = ranks if isinstance(ranks, int) else ranks.get(name, 0)
        if p.ndim > 1 and rank and "wpe" not in name and "wte" not in name:
            change = 0.1 * torch.randn(p.shape[0], rank) @ torch.randn(rank, p[0].numel())
            p.data += change.reshape(p.shape)
    return after.eval()


def saved(folder: Path, before: nn.Module, after: nn.Module) -> tuple[str, str]:
    for name, module in (("before.pt", before), ("after.pt", after)):
        torch.save(module.state_dict(), folder / name)
    return str(folder / "before.pt"), str(folder / "after.pt")


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    torch.manual_seed(0)
    module = mlp(16)
    return saved(tmp_path, module, moved_by(module, RANKS))


def test_ranks_of_planted_changes_are_advised_where_the_budget_suffices(
    two: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["advise-ranks", *two, "--budget", "1000", "--json"])
    told = json.loads(capsys.readouterr().out)

    before, after = (torch.load(path, weights_only=True) for path in two)
    spectra = {
        name: np.linalg.svd((after[name] - before[name]).double().numpy(), compute_uv=False) ** 2 for name in RANKS
    }
    kept = sum(spectra[name][: told["ranks"][name]].sum() for name in RANKS)
    assert all(told["ranks"][name] >= rank for name, rank in RANKS.items()) and told["spent"] <= 1000
    assert told["captured"] == pytest.approx(kept / sum(map(np.sum, spectra.values())))


def test_a_small_budget_goes_to_the_directions_that_are_worth_most(
    two: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["advise-ranks", *two, "--budget", "200", "--json"])
    told = json.loads(capsys.readouterr().out)
    main(["advise-ranks", *two, "--budget", "2kB", "--method", "galore", "--least", "1"])

    assert told["captured"] > told["captured_by_uniform"] and told["spent"] <= 200
    assert "0.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "model"),
    [(lambda: mlp(16), None), (gpt2, f"{__name__}:gpt2"), (Convolving, None), (Embedding, None)],
    ids=["mlp", "gpt2", "convolution", "embedding"],
)
def test_peft_loads_what_is_extracted_onto_the_base(make: Any, model: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make().eval()
    after = moved_by(base, 2)
    words = [] if model is None else ["--model", model]

    main(["extract-lora", *saved(tmp_path, base, after), "--energy", "0.999999", *words, "-o", str(tmp_path / "lora")])

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert_close(loaded(X), after(X), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(base(X), after(X), atol=1e-2)


def test_what_a_pair_leaves_of_a_change_is_said_for_each_layer(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ranks.json").write_text(json.dumps({"0.weight": 1, "2.weight": 2}))
    options = ["--ranks", str(tmp_path / "ranks.json"), "-o", str(tmp_path / "lora"), "--json"]

    main(["extract-lora", *two, *options])
    told = json.loads(capsys.readouterr().out)

    before, after = (torch.load(path, weights_only=True) for path in two)
    for name, rank in (("0.weight", 1), ("2.weight", 2), ("4.weight", 0)):
        change = (after[name] - before[name]).double().numpy()
        values = np.linalg.svd(change, compute_uv=False)
        rest = np.sqrt((values[rank:] ** 2).sum())
        assert told[name]["rank"] == rank
        assert_allclose(told[name]["error"], rest / np.linalg.norm(change), atol=1e-6)
        assert_allclose(told[name]["error_over_weight"], rest / np.linalg.norm(after[name]), atol=1e-6)


def test_advised_ranks_are_read_by_what_extracts(two: tuple[str, str], tmp_path: Path) -> None:
    ranks = tmp_path / "ranks.json"
    main(["advise-ranks", *two, "--budget", "300", "-o", str(ranks)])
    main(["extract-lora", *two, "--ranks", str(ranks), "-o", str(tmp_path / "lora")])

    told = json.loads(ranks.read_text())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == told["spent"] <= 300


def test_an_extracted_adapter_merged_into_the_base_is_the_fine_tuned_model(
    two: tuple[str, str], tmp_path: Path
) -> None:
    main(["extract-lora", *two, "--energy", "1", "-o", str(tmp_path / "lora")])
    main(["merge", str(tmp_path / "lora"), two[0], "-o", str(tmp_path / "merged.safetensors")])

    merged, after = load_file(tmp_path / "merged.safetensors"), torch.load(two[1], weights_only=True)
    assert merged.keys() == after.keys()
    for name, tensor in merged.items():
        assert_close(tensor, after[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: mlp(16), gpt2, Convolving], ids=["mlp", "gpt2", "convolution"])
def test_a_merge_of_an_adapter_of_peft_is_that_of_peft(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make().eval()
    layers = [name for name, layer in base.named_modules() if type(layer).__name__ in ("Linear", "Conv1D", "Conv2d")]
    config = LoraConfig(r=2, lora_alpha=5, target_modules=layers[:-1], rank_pattern={layers[0]: 3})
    theirs = get_peft_model(copy.deepcopy(base), config)
    for name, p in theirs.named_parameters():
        p.data += 0.1 * torch.randn(p.shape) * ("lora_" in name)
    theirs.save_pretrained(tmp_path / "lora")
    torch.save({f"inner.{name}": tensor for name, tensor in base.state_dict().items()}, tmp_path / "base.pt")

    merged = str(tmp_path / "merged.safetensors")
    main(["merge", str(tmp_path / "lora"), str(tmp_path / "base.pt"), "--within", "inner", "-o", merged])

    ours = {name.removeprefix("inner."): tensor for name, tensor in load_file(merged).items()}
    expected = theirs.merge_and_unload().state_dict()  # type: ignore[operator]
    for name, tensor in ours.items():
        assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


SQUARE = {
    "of Conv1D alone": ["network.h.0.attn.c_proj"],
    "of Conv1D beside others": ["network.h.0.attn.c_proj", "network.h.0.mlp.c_fc"],
    "of a linear layer": ["0"],
}


def adapted(case: str, folder: Path) -> tuple[Any, str]:
    """peft's model with pairs that are not zero, in a folder, and the checkpoint of the base."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 12)) if case == "of a linear layer" else gpt2()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=SQUARE[case])
    theirs = get_peft_model(copy.deepcopy(base.eval()), config)
    for name, p in theirs.named_parameters():
        p.data += 0.1 * torch.randn(p.shape) * ("lora_" in name)
    theirs.save_pretrained(folder / "lora")
    torch.save(base.state_dict(), folder / "base.pt")
    return theirs, str(folder / "base.pt")


@pytest.mark.parametrize("case", SQUARE)
def test_square_weights_are_merged_as_they_lie_by_what_peft_says(case: str, tmp_path: Path) -> None:
    theirs, base = adapted(case, tmp_path)

    main(["merge", str(tmp_path / "lora"), base, "-o", str(tmp_path / "merged.safetensors")])

    expected = theirs.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged.safetensors").items():
        assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


class Both(nn.Module):
    """Weights of both layouts, and a square one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.square, self.last = Conv1D(20, 12), Conv1D(20, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.square(self.wide(x[:, :12])))


def test_square_weights_beside_both_layouts_need_the_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Both()
    files = saved(tmp_path, base, moved_by(base, 2))
    lora, merged = str(tmp_path / "lora"), str(tmp_path / "merged.safetensors")
    model = ["--model", f"{__name__}:Both"]
    main(["extract-lora", *files, "--energy", "1", *model, "-o", lora])

    with pytest.raises(SystemExit, match=r"\['square\.weight'\] may have their inputs as rows .* give --model"):
        main(["merge", lora, files[0], "-o", merged])
    assert not Path(merged).exists()
    main(["merge", lora, files[0], *model, "-o", merged])
    for name, tensor in load_file(merged).items():
        assert_close(tensor, torch.load(files[1], weights_only=True)[name], rtol=1e-4, atol=1e-5)


def test_what_is_extracted_says_how_its_weights_lie(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for make, model, expected in ((gpt2, ["--model", f"{__name__}:gpt2"], True), (lambda: mlp(16), [], False)):
        base = make().eval()
        words = ["--exclude", "head*", *model] if model else []
        main(["extract-lora", *saved(tmp_path, base, moved_by(base, 2)), *words, "-o", str(tmp_path / "lora")])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PeftModel.from_pretrained(base, tmp_path / "lora")
        config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert config["fan_in_fan_out"] is expected


def test_a_part_of_the_model_may_be_what_peft_gets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = mlp(16).eval()
    after = moved_by(base, 2)
    files = saved(tmp_path, nn.ModuleDict({"net": base}), nn.ModuleDict({"net": after}))

    main(["extract-lora", *files, "--energy", "0.999999", "--within", "net", "-o", str(tmp_path / "lora")])

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert_close(loaded(X), after(X), rtol=1e-3, atol=1e-4)


def test_what_changed_and_is_in_no_pair_is_named(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = torch.load(two[1], weights_only=True)
    torch.save(after | {"0.bias": after["0.bias"] + 1}, two[1])

    main(["extract-lora", *two, "--exclude", "4*", "-o", str(tmp_path / "lora")])

    assert "changed, but not in the adapter: ['0.bias', '4.weight']" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["advise-ranks", "A", "B", "--budget", "8 apples"], "or memory, such as '8 MB'"),
        (["advise-ranks", "A", "B", "--budget", "10", "--least", "1"], "is too small: rank 1 for every matrix"),
        (["extract-lora", "A", "A", "-o", "lora"], "none of the chosen weights of .* changed"),
        (["extract-lora", "A", "B", "--energy", "2", "-o", "lora"], "energy=2.0 must be above 0 and at most 1"),
        (["extract-lora", "A", "B", "--ranks", "ranks.json", "-o", "lora"], r"the ranks name \['9.weight'\]"),
        (["extract-lora", "A", "B", "--ranks", "no.json", "-o", "lora"], "no.json cannot be read as JSON"),
        (["merge", "lora", "A", "-o", "merged.safetensors"], "lora has no adapter_config.json"),
        (["merge", "other", "A", "-o", "merged.safetensors"], "the adapter is for .*, which .* lacks.*--within"),
    ],
)
def test_bad_input_is_refused_in_words(
    words: list[str],
    why: str,
    two: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ranks.json").write_text('{"ranks": {"9.weight": 2}}')
    get_peft_model(nn.ModuleDict({"x": nn.Linear(4, 4)}), LoraConfig(r=2, target_modules=["x"])).save_pretrained(
        "other"
    )

    with pytest.raises(SystemExit, match=why):
        main([dict(zip("AB", two, strict=True)).get(word, word) for word in words])


def test_another_architecture_is_named_and_no_change_is_not(two: tuple[str, str], tmp_path: Path) -> None:
    wider = {n: torch.ones([size + 1 for size in t.shape]) for n, t in mlp(16).state_dict().items()}
    torch.save(wider, tmp_path / "other.pt")
    words = ["-o", str(tmp_path / "lora")]

    with pytest.raises(SystemExit, match=r"other\.pt has another architecture than .*'0\.weight': \(17, 65\)"):
        main(["extract-lora", two[0], str(tmp_path / "other.pt"), *words])
    with pytest.raises(SystemExit, match=r"none of the chosen weights of .* changed"):
        main(["extract-lora", two[0], two[0], *words])


def test_a_weight_of_another_shape_is_told_to_be_left_out(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.load(two[1], weights_only=True) | {"4.weight": torch.ones(12, 16)}, tmp_path / "wider.pt")

    main(["extract-lora", two[0], str(tmp_path / "wider.pt"), "-o", str(tmp_path / "lora"), "--json"])

    assert json.loads(capsys.readouterr().out)["left_out"] == ["4.weight"]


def test_the_beginning_of_an_option_is_none(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["extract-lora", *two, "--rank", "ranks.json", "-o", str(tmp_path / "lora")])

    assert "--rank " in capsys.readouterr().err
